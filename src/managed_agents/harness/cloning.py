"""Clones a session's repositories into its sandbox, before its first call runs there.

Each clone is a call of the sandbox's shell under an id of its own, so that it goes on when its owner dies, and the next owner
attaches to it. What became of it is written to the sandbox's row: nothing is cloned twice into a sandbox, and what was restored
from a snapshot is as the session left it. One that fails costs the session that repository only; clients are told once.

Git knows no token: the egress gateway writes it into the requests. So nothing here has to be kept from the commands.

What one session cloned saves later ones the transfer (`clone_cache`): once the host has said that this session may read the
repository, the cached clone is put into its sandbox, and git fetches the rest. Keeping a clone goes on behind the first calls.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import anyio

from managed_agents.core import faults, limits
from managed_agents.db.engine import Database
from managed_agents.eventlog import events as ev
from managed_agents.harness import clone_script
from managed_agents.harness.clone_cache import CloneCache
from managed_agents.harness.clone_script import ACCESS_SECONDS_MAX, MEANINGS, Cloned, Kept
from managed_agents.resources.sessions import repositories
from managed_agents.resources.sessions.clones import CachedClone, CloneKey
from managed_agents.resources.sessions.repositories import ErrorType, Repository, State
from managed_agents.sandbox.backend import Call, CallUnknown, Outcome, Sandbox

CLONED = faults.register("hands.cloned", "repository cloned or failed to, not recorded")


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


class Repositories:
    """One session's repositories, as its owner sees to them."""

    def __init__(
        self, db: Database, cache: CloneCache, workspace_id: str, session_id: str, epoch: int, *, has_gateway: bool
    ) -> None:
        self._db, self._cache = db, cache
        self._workspace_id, self._session_id, self._epoch = workspace_id, session_id, epoch
        self._has_gateway = has_gateway
        self._cloning = anyio.Lock()
        self._wanted: list[Repository] | None = None
        self._seen_to: str | None = None  # the sandbox that has them
        self._untold: list[Trouble] = []
        self._to_keep: list[tuple[Sandbox, Repository, CloneKey, Kept]] = []
        self._more_to_keep = anyio.Event()

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
                if state is None or state.again:
                    state = await self._cloned(sandbox, one, 0 if state is None else state.attempt)
                if state.error is not None and not state.told:
                    self._untold.append(Trouble(one, state.error, state.message))
            self._seen_to = sandbox.id

    async def _cloned(self, sandbox: Sandbox, one: Repository, attempt: int) -> State:
        if not self._has_gateway:
            why = "Repositories come through the egress gateway, which sandboxes of this server's kind do not have."
            state = State("repository_clone_error", f"{one.url}: {MEANINGS['repository_clone_error']}. {why}", attempt=attempt)
            await self._record(sandbox.id, {one.id: state})
            return state
        if attempt:
            return await self._cloned_again(sandbox, one, attempt)
        key = await self._cache.key(self._session_id, self._workspace_id, one)
        cached = None if key is None else await self._cache.use(key)
        cloned = await self._run(sandbox, one, key, cached)
        faults.reach(CLONED)
        await self._record(sandbox.id, {one.id: cloned.state})
        for call_id in (_access_id(one), _clone_id(one), _plain_id(one)):
            await sandbox.ack(call_id)
        if key is not None and cached is not None and cloned.spoiled:
            await self._cache.drop(key, cached)
        if key is not None and cloned.kept is not None:
            self._to_keep.append((sandbox, one, key, cloned.kept))
            self._more_to_keep.set()
        return cloned.state

    async def _cloned_again(self, sandbox: Sandbox, one: Repository, attempt: int) -> State:
        """Clone from the host alone. The model's commands have run: what is where the clone is to be may be theirs, and stays."""
        call_id = f"{_clone_id(one)}.{attempt}"
        asked = clone_script.clone(one, bundle=_bundle_path(one), known_bytes=0, keeps=False)
        outcome = await self._call(sandbox, call_id, asked, limits.TOOL_CALL_SECONDS_MAX)
        state = replace(clone_script.read(one, outcome).state, attempt=attempt)
        faults.reach(CLONED)
        await self._record(sandbox.id, {one.id: state})
        await sandbox.ack(call_id)
        return state

    async def _run(self, sandbox: Sandbox, one: Repository, key: CloneKey | None, cached: CachedClone | None) -> Cloned:
        try:
            # A former owner's: what it was given, it may be reading.
            cloned = clone_script.read(one, await sandbox.collect(_clone_id(one), self._epoch))
            return await self._plain(sandbox, one) if cloned.unfinished and key is not None else cloned
        except CallUnknown:
            pass
        bundle = _bundle_path(one)
        if key is not None and cached is not None:
            asked = clone_script.access(one)
            answered = clone_script.read(one, await self._call(sandbox, _access_id(one), asked, ACCESS_SECONDS_MAX))
            if answered.state.error is not None:
                return answered
            if not await self._cache.put(sandbox, bundle, key, cached):
                cached = None
        known_bytes = cached.blob.size if cached is not None and cached.fresh else 0
        asked = clone_script.clone(one, bundle=bundle, known_bytes=known_bytes, keeps=key is not None)
        cloned = clone_script.read(one, await self._call(sandbox, _clone_id(one), asked, limits.TOOL_CALL_SECONDS_MAX))
        if cloned.unfinished and key is not None and cached is not None:
            # Too slow, or too large beside the clone itself: so it would be in every session.
            await self._cache.drop(key, cached)
            return await self._plain(sandbox, one)
        return cloned

    async def _plain(self, sandbox: Sandbox, one: Repository) -> Cloned:
        """Clone from the host alone, after a clone that was cut off. No command of the model's has run: what is there is ours."""
        asked = clone_script.clone(one, bundle=_bundle_path(one), known_bytes=0, keeps=False, again=True)
        return clone_script.read(one, await self._call(sandbox, _plain_id(one), asked, limits.TOOL_CALL_SECONDS_MAX))

    async def _call(self, sandbox: Sandbox, call_id: str, command: str, seconds: float) -> Outcome:
        asked = {"command": command, "timeout_ms": int(seconds * 1000)}
        return await sandbox.execute(Call(call_id, self._epoch, "bash", asked, seconds))

    async def keep_clones(self) -> None:
        """Keep for later sessions what was cloned here. Runs until cancelled; what is under way then is given up."""
        while True:
            await self._more_to_keep.wait()
            self._more_to_keep = anyio.Event()
            while self._to_keep:
                await self._cache.keep(*self._to_keep.pop(0))

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
            async with self._db.transaction() as tx:
                for one in troubles:
                    await repositories.set_told(tx, self._seen_to, one.repository.id)


def _access_id(repository: Repository) -> str:
    return f"{repository.id}.access"


def _clone_id(repository: Repository) -> str:
    return f"{repository.id}.clone"


def _plain_id(repository: Repository) -> str:
    return f"{repository.id}.plain"


def _bundle_path(repository: Repository) -> str:
    return f"/tmp/{repository.id}.bundle"  # in no snapshot, and gone when the clone is there
