"""What the sandbox's shell runs to clone a repository, and what its words mean.

A clone from a bundle is a clone from the host all the same: git asks the host for its branches and for what it is missing, and
takes from the bundle only objects that these branches lead to (`--dissociate` copies those and lets go of the rest). A bundle is
unpacked by git, which computes the name of every object from its content. So nothing that a bundle says is believed: it can save
a transfer, or be useless.

The bundle to keep is not made here: it is what the clone consists of already, a list of names and one pack. The script says its
digest before any command can have run, and what is taken out later is held against that.
"""

import re
import shlex
from dataclasses import dataclass

from managed_agents.core import limits
from managed_agents.resources.sessions.repositories import ErrorType, Repository, State
from managed_agents.sandbox.backend import Outcome

MESSAGE_CHARS_MAX = 500
ACCESS_SECONDS_MAX = 120.0
BUNDLE_HEADER = b"# v2 git bundle\n"
NAMED = re.compile(rb"^[0-9a-f]{40} refs/")
"""A line of packed-refs that belongs into a bundle; the script has its twin."""

# spec: the descriptions of the SDK's repository errors
MEANINGS: dict[ErrorType, str] = {
    "repository_authentication_error": "the repository host rejected the credentials, or required credentials and received none",
    "repository_forbidden_error": "the repository host refused access to the repository",
    "repository_not_found_error": "the repository host reported the repository as not found",
    "repository_checkout_error": "the requested branch or commit does not exist in the repository",
    "repository_clone_error": "the repository could not be cloned",
}
_SIGNS: tuple[tuple[ErrorType, re.Pattern[str]], ...] = (
    (
        "repository_authentication_error",
        re.compile(r"Authentication failed|could not read (Username|Password)|prompts disabled|URL returned error: 401"),
    ),
    ("repository_forbidden_error", re.compile(r"URL returned error: 403")),
    (
        "repository_not_found_error",
        re.compile(r"URL returned error: (404|410)|[Rr]epository ('[^']*' )?not found"),
    ),
)
_OPENING = r"""
    export LC_ALL=C GIT_TERMINAL_PROMPT=0 GIT_ASKPASS=
    url=%(url)s
    work=$(mktemp -d /tmp/%(id)s.XXXXXXXX) || { echo "repository: clone"; exit 0; }
    log=$work/log from=host kept=
    end() {
        tail -c 2000 "$log" | tr '\r' '\n'; rm -rf "$work"
        printf '\nfrom: %%s\nkept:%%s\nrepository: %%s\n' "$from" "$kept" "$1"; exit 0
    }"""
_ACCESS = (
    "("
    + _OPENING
    + r"""
    git ls-remote --quiet -- "$url" HEAD > "$log" 2>&1 < /dev/null || end clone
    end done
)"""
)
_CLONE = (
    "("
    + _OPENING
    + r"""
    dir=%(path)s branch=%(branch)s sha=%(sha)s bundle=%(bundle)s known=%(known)d
    if [ %(again)d = 1 ]; then
        rm -rf "$dir"
        for left in /tmp/%(id)s.*; do [ "$left" = "$work" ] || rm -rf "$left"; done
    fi
    trap 'rm -f "$bundle"' EXIT
    from_bundle() {
        [ -z "$(ls -A "$dir" 2> /dev/null)" ] || return 1
        git init --quiet --bare "$work/cache" &&
            timeout %(unpack)d git -C "$work/cache" -c gc.auto=0 fetch --quiet "$bundle" 'refs/*:refs/*' &&
            rm -f "$bundle" &&
            timeout %(clone)d git -c repack.updateServerInfo=false clone --quiet --no-checkout \
                --reference "$work/cache" --dissociate -- "$url" "$dir" && return 0
        rm -rf "$dir" 2> /dev/null
        return 1
    }
    beginning() { printf '# v2 git bundle\n'; sed -n '/^[0-9a-f]\{40\} refs\//p' "$refs"; echo; }
    keep() {
        refs=$dir/.git/packed-refs
        set -- "$dir"/.git/objects/pack/*.pack
        [ $# = 1 ] && [ -f "$1" ] && [ -f "$refs" ] && [ $(($(wc -c < "$refs"))) -le %(refs_max)d ] || return
        bytes=$(($(beginning | wc -c) + $(wc -c < "$1")))
        changed=$((bytes > known ? bytes - known : known - bytes))
        [ "$bytes" -le %(bytes_max)d ] && [ $((changed * 8)) -gt "$known" ] || return
        digest=$({ beginning; cat "$1"; } | timeout %(digest)d sha256sum) || return
        kept=" ${1##*/} ${digest%%%% *}"
    }
    if [ -f "$bundle" ]; then
        if from_bundle > "$log" 2>&1 < /dev/null; then from=bundle; else from=host-after-bundle known=0; fi
        rm -rf "$bundle" "$work/cache"
    fi
    if [ "$from" != bundle ]; then
        git clone --quiet --no-checkout -- "$url" "$dir" > "$log" 2>&1 < /dev/null || end clone
    fi
    [ %(bytes_max)d = 0 ] || keep 2> /dev/null
    cd "$dir" || end clone
    if [ -n "$branch" ]; then
        git rev-parse --quiet --verify "refs/remotes/origin/$branch" > "$log" 2>&1 || end checkout
        git checkout --quiet --force "$branch" -- > "$log" 2>&1 || end checkout
    elif [ -n "$sha" ]; then
        git cat-file -e "$sha^{commit}" 2> "$log" || git fetch --quiet origin "$sha" > "$log" 2>&1 || end checkout
        git checkout --quiet --force --detach "$sha" -- > "$log" 2>&1 || end checkout
    elif git rev-parse --quiet --verify HEAD > "$log" 2>&1; then
        git reset --quiet --hard > "$log" 2>&1 || end clone
    fi
    end done
)"""
)
_LAST_LINES = re.compile(
    r"^(?:from: (?P<from>[a-z-]+)\nkept:(?: (?P<pack>pack-[0-9a-f]+\.pack) (?P<sha256>[0-9a-f]{64}))?\n)?"
    r"repository: (?P<end>done|clone|checkout)\s*\Z",
    re.MULTILINE,
)


@dataclass(frozen=True, slots=True)
class Kept:
    """A pack of the clone, and the digest of the bundle that it makes."""

    pack: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Cloned:
    """What became of a clone. `spoiled`: it was to come from a bundle, which was of no use. `unfinished`: it was cut off."""

    state: State
    kept: Kept | None = None
    spoiled: bool = False
    unfinished: bool = False


def access(repository: Repository) -> str:
    """A script that asks the host whether the session may read the repository."""
    return _ACCESS % {"id": repository.id, "url": shlex.quote(repository.url)}


def clone(repository: Repository, *, bundle: str, known_bytes: int, keeps: bool, again: bool = False) -> str:
    """A script that clones a repository, from the file `bundle` as far as that goes when there is one, and removes the file.

    It says what to keep, when `keeps` and that differs much in size from `known_bytes`. `again` removes first what a clone that
    was cut off has left.
    """
    return _CLONE % {
        "id": repository.id,
        "again": again,
        "url": shlex.quote(repository.url),
        "path": shlex.quote(repository.path),
        "branch": shlex.quote(repository.branch or ""),
        "sha": shlex.quote(repository.sha or ""),
        "bundle": shlex.quote(bundle),
        "known": known_bytes,
        "bytes_max": limits.CLONE_BYTES_MAX if keeps else 0,
        "refs_max": limits.CLONE_REFS_BYTES_MAX,
        # Together they leave half of the call's time to a plain clone.
        "unpack": int(limits.TOOL_CALL_SECONDS_MAX * 0.2),
        "clone": int(limits.TOOL_CALL_SECONDS_MAX * 0.3),
        "digest": int(limits.TOOL_CALL_SECONDS_MAX * 0.05),
    }


def read(repository: Repository, outcome: Outcome) -> Cloned:
    """Understand what a script said."""
    said = "".join(block.get("text", "") for block in outcome.content)
    found = _LAST_LINES.search(said)
    ended = found["end"] if found else "clone"
    kept = Kept(found["pack"], found["sha256"]) if found and found["sha256"] else None
    # Where the host would not give the clone either, the bundle may be fine.
    spoiled = ended != "clone" and found is not None and found["from"] == "host-after-bundle"
    if ended == "done":
        return Cloned(State(), kept, spoiled)
    words = said[: found.start()] if found else said
    error: ErrorType = "repository_checkout_error" if ended == "checkout" else _error_of(words)
    message = f"{repository.url}: {MEANINGS[error]}."
    if error == "repository_clone_error":
        lines = [line.strip() for line in words.splitlines() if line.strip()]
        message += f" {' '.join(lines[-3:])[:MESSAGE_CHARS_MAX]}" if lines else ""
    return Cloned(State(error, message), kept, spoiled, found is None)


def _error_of(said: str) -> ErrorType:
    for kind, sign in _SIGNS:
        if sign.search(said):
            return kind
    return "repository_clone_error"
