"""Clones a session's repositories into its sandbox, before its first call runs there.

Each clone is a call of the sandbox's shell under an id of its own, so that it goes on when its owner dies, and the next owner
attaches to it. What became of it is written to the sandbox's row: nothing is cloned twice into a sandbox, and what was restored
from a snapshot is as the session left it. One that fails costs the session that repository only; clients are told once.

Git knows no token: the egress gateway writes it into the requests. So nothing here has to be kept from the commands.
"""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

import anyio

from managed_agents.core import faults, limits
from managed_agents.db.engine import Database
from managed_agents.eventlog import events as ev
from managed_agents.resources.sessions import repositories
from managed_agents.resources.sessions.repositories import ErrorType, Repository, State
from managed_agents.sandbox.backend import Call, Outcome, Sandbox

CLONED = faults.register("hands.cloned", "repository cloned or failed to, not recorded")
MESSAGE_CHARS_MAX = 500

# spec: the descriptions of the SDK's repository errors
_MEANINGS: dict[ErrorType, str] = {
    "repository_authentication_error": "the repository host rejected the credentials, or required credentials and received none",
    "repository_forbidden_error": "the repository host refused access to the repository",
    "repository_not_found_error": "the repository host reported the repository as not found",
    "repository_checkout_error": "the requested branch or commit does not exist in the repository",
    "repository_clone_error": "the repository could not be cloned",
}
_SIGNS: Sequence[tuple[ErrorType, re.Pattern[str]]] = (
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
_SCRIPT = r"""(
    export LC_ALL=C GIT_TERMINAL_PROMPT=0 GIT_ASKPASS=
    url=%(url)s dir=%(path)s branch=%(branch)s sha=%(sha)s
    log=$(mktemp) || { echo "repository: clone"; exit 0; }
    end() { tail -c 2000 "$log" | tr '\r' '\n'; rm -f "$log"; printf '\nrepository: %%s\n' "$1"; exit 0; }
    git clone --quiet --no-checkout -- "$url" "$dir" > "$log" 2>&1 < /dev/null || end clone
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
_LAST_LINE = re.compile(r"^repository: (done|clone|checkout)\s*\Z", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Trouble:
    """A repository that is missing in the sandbox, as clients are to be told."""

    repository: Repository
    error: ErrorType
    message: str

    def event(self, thread_id: str) -> ev.NewEvent:
        """spec: repository errors always say `retrying`: the session goes on without the repository."""
        more = {"repository_url": self.repository.url}
        return ev.session_error(thread_id, self.error, self.message, "retrying", more)


def script(repository: Repository) -> str:
    """What the sandbox's shell runs to clone a repository; its last line says how it ended."""
    return _SCRIPT % {
        "url": shlex.quote(repository.url),
        "path": shlex.quote(repository.path),
        "branch": shlex.quote(repository.branch or ""),
        "sha": shlex.quote(repository.sha or ""),
    }


def state_of(repository: Repository, outcome: Outcome) -> State:
    """Read what became of a clone."""
    said = "".join(block.get("text", "") for block in outcome.content)
    found = _LAST_LINE.search(said)
    ended = found[1] if found else "clone"
    if ended == "done":
        return State()
    error: ErrorType = "repository_checkout_error" if ended == "checkout" else "repository_clone_error"
    if ended == "clone":
        error = _error_of(said)
    message = f"{repository.url}: {_MEANINGS[error]}."
    if error == "repository_clone_error":
        lines = [line.strip() for line in said.splitlines() if line.strip() and not _LAST_LINE.match(line)]
        message += f" {' '.join(lines[-3:])[:MESSAGE_CHARS_MAX]}" if lines else ""
    return State(error, message)


def _error_of(said: str) -> ErrorType:
    for kind, sign in _SIGNS:
        if sign.search(said):
            return kind
    return "repository_clone_error"


class Repositories:
    """One session's repositories, as its owner sees to them."""

    def __init__(self, db: Database, session_id: str, epoch: int, *, has_gateway: bool) -> None:
        self._db, self._session_id, self._epoch = db, session_id, epoch
        self._has_gateway = has_gateway
        self._cloning = anyio.Lock()
        self._wanted: list[Repository] | None = None
        self._seen_to: str | None = None  # the sandbox that has them
        self._untold: list[Trouble] = []

    async def wanted(self) -> list[Repository]:
        """The session's repositories: those it was created with."""
        if self._wanted is None:
            async with self._db.autocommit() as tx:
                self._wanted = await repositories.of_session(tx, self._session_id)
        return self._wanted

    async def clone(self, sandbox: Sandbox) -> None:
        """Have every repository cloned, or failed to. Repeating is safe; cancelling leaves a clone running.

        Raises: SandboxError.
        """
        async with self._cloning:
            if self._seen_to == sandbox.id or not (wanted := await self.wanted()):
                return
            async with self._db.autocommit() as tx:
                states = await repositories.states(tx, sandbox.id)
            for one in wanted:
                state = states.get(one.id)
                if state is None:
                    state = await self._cloned(sandbox, one)
                if state.error is not None and not state.told:
                    self._untold.append(Trouble(one, state.error, state.message))
            self._seen_to = sandbox.id

    async def _cloned(self, sandbox: Sandbox, one: Repository) -> State:
        if not self._has_gateway:
            why = "Repositories come through the egress gateway, which sandboxes of this server's kind do not have."
            state = State("repository_clone_error", f"{one.url}: {_MEANINGS['repository_clone_error']}. {why}")
            await self._record(sandbox.id, {one.id: state})
            return state
        call_id = f"{one.id}.clone"
        state = state_of(one, await sandbox.execute(self._call(call_id, one)))
        faults.reach(CLONED)
        await self._record(sandbox.id, {one.id: state})
        await sandbox.ack(call_id)
        return state

    def _call(self, call_id: str, repository: Repository) -> Call:
        seconds = limits.TOOL_CALL_SECONDS_MAX
        asked = {"command": script(repository), "timeout_ms": int(seconds * 1000)}
        return Call(call_id, self._epoch, "bash", asked, seconds)

    async def _record(self, sandbox_id: str, changed: dict[str, State]) -> None:
        async with self._db.autocommit() as tx:
            await repositories.set_states(tx, sandbox_id, changed)

    def troubles(self) -> list[Trouble]:
        """What clients are to be told now; each trouble is given once."""
        taken, self._untold = self._untold, []
        return taken

    async def told(self, troubles: Sequence[Trouble]) -> None:
        """Record that clients know. A crash before it tells them again."""
        if troubles and self._seen_to is not None:
            await self._record(self._seen_to, {one.repository.id: State(one.error, one.message, told=True) for one in troubles})
