"""The seam between the harness and the hands.

A backend makes sandboxes and finds them again; a `Sandbox` is a handle on one, held by whoever works with
it and rebuilt at will from the id alone. Nothing durable is in these objects: a worker may die between any
two calls, and the next one attaches. Invariant: a tool use id runs at most once in the life of a sandbox
generation.
"""

import hashlib
import logging
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

logger = logging.getLogger(__name__)

Which = Literal["disk", "memory", "pids", "outcomes"]
Capability = Literal["isolation", "network", "memory", "pids", "cpus", "disk", "packages", "pause"]
Owner = Literal["root", "agent"]
Packages = Mapping[str, Sequence[str]]
"""By manager, in its own pin syntax."""
SandboxKey = tuple[str, int]
"""Id and generation."""


class SandboxError(Exception):
    """The hands could not do what was asked; nothing more is known."""


class SandboxGone(SandboxError):
    """The sandbox is dead or was never there. A call under way is ambiguous: it may have run in part."""


class SandboxUnreachable(SandboxError):
    """Neither the sandbox nor whoever knows whether it lives could be reached. A call under way is as ambiguous as after
    its death, but the sandbox may be there again later.
    """


class SandboxBusy(SandboxError):
    """The runner takes no more calls until outcomes are acknowledged. Try again later."""


class LimitHit(SandboxError):
    """A bound of the sandbox stopped the request."""

    def __init__(self, which: Which, message: str = "") -> None:
        super().__init__(message or f"limit hit: {which}")
        self.which: Which = which


class PackagesFailed(SandboxError):
    """Packages of the environment could not be installed; the message has the tool's own last lines."""


class StaleEpoch(SandboxError):
    """Someone with a higher epoch owns the session: stop and write nothing more."""


class CallUnknown(SandboxError):
    """The runner has no call of this id: it never began there, or its outcome was acknowledged."""


class BadArchive(SandboxError):
    """What was to be restored is not a snapshot."""


class FileChanging(SandboxError):
    """A file was written to while it was read."""


class PathNotFound(SandboxError):
    """No such file in the sandbox."""


@dataclass(frozen=True)
class Limits:
    """Bounds of one sandbox. A backend that cannot enforce one lacks it in `capabilities`."""

    memory_bytes: int = 8 * 1024**3
    disk_bytes: int = 10 * 1024**3
    cpus: float = 2.0
    pids: int = 512
    open_files: int = 16_384
    """Of one process."""
    output_bytes: int = 64 * 1024**2
    """Of one call's output, kept on the session's disk; the model gets a preview."""
    call_seconds: float = 600.0
    """Wall time of one call."""


@dataclass(frozen=True)
class SandboxSpec:
    """What to make. `(id, generation)` names it; a higher generation replaces a lost sandbox."""

    id: str
    generation: int
    image: str
    limits: Limits = field(default_factory=Limits)
    network: Literal["none", "gateway"] = "none"
    """`gateway`: nothing but the host's egress gateway, at a socket of its own."""
    ca_bundle: Path | None = None
    """On the host: certificate authorities for commands to trust instead of the image's, and for Java at `layout.java_bundle`."""
    env: Mapping[str, str] = field(default_factory=dict[str, str])
    """Added to the commands' environment. Never a secret: commands can print it."""
    session_id: str | None = None
    """For labels only."""

    @property
    def fingerprint(self) -> str:
        """The same for sandboxes that differ in nothing but whose they are: one made ahead serves for any of them."""
        likeness = replace(self, id="", generation=0, session_id=None)
        return hashlib.sha256(repr((likeness, sorted(self.env.items()))).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Call:
    """One tool call. `epoch` is the caller's lease epoch, `input` the model's arguments."""

    tool_use_id: str
    epoch: int
    name: str
    input: Mapping[str, Any]
    deadline_seconds: float = 600.0
    """Longest run time, a cap on the model's own `timeout_ms`. Waiting for another `bash` call is not
    counted.
    """


@dataclass(frozen=True)
class Outcome:
    """A tool's answer: content blocks as the model takes them. Errors carry one text block."""

    content: list[dict[str, Any]]
    is_error: bool
    spill_path: str | None = None
    """Where in the sandbox the full output is, when `content` is only its preview."""


@dataclass(frozen=True)
class FileEntry:
    """A regular file; `path` is relative to the directory listed.

    `sha256` is empty where it was not asked for, or there was too much to read.
    """

    path: str
    size: int
    mtime: float
    sha256: str
    signature: str = ""
    """Differs once the file was written to. Empty from a runner of an older release."""
    unchanged_seconds: float = 0.0
    """Since the file was last written to, by the sandbox's clock."""


@dataclass(frozen=True)
class Labelled:
    """A sandbox as the backend finds it."""

    id: str
    generation: int
    session_id: str | None
    running: bool
    paused: bool = False
    """Runs, but its processes are frozen."""


Known = Callable[[], Awaitable[set[SandboxKey]]]
"""Says which sandboxes may exist."""


class Sandbox(Protocol):
    """A handle on one sandbox. Any method raises `SandboxGone` when the sandbox is really dead, and only
    then: a lost connection to a living runner is made again inside.
    """

    @property
    def id(self) -> str: ...

    @property
    def generation(self) -> int: ...

    async def execute(self, call: Call) -> Outcome:
        """Run a call, or attach to it when its id is known to the runner, or return its kept outcome.
        Repeating is safe. Cancelling the awaiting task leaves the call running.

        Raises: StaleEpoch, SandboxBusy.
        """
        ...

    async def collect(self, tool_use_id: str, epoch: int) -> Outcome:
        """As `execute` for a call that must have begun already.

        Raises: CallUnknown, StaleEpoch.
        """
        ...

    async def cancel(self, tool_use_id: str, epoch: int) -> None:
        """End a running call; whoever waits for it gets an error outcome. A finished one stays as it is.

        Returns when it has ended. One that is not known will not be begun either, should its request come late.

        Raises: CallUnknown, StaleEpoch.
        """
        ...

    async def ack(self, tool_use_id: str) -> None:
        """Say that the outcome is in the log, so that the runner may forget it. Repeating is safe."""
        ...

    async def put(self, path: str, stream: AsyncIterable[bytes] | bytes, owner: Owner, mode: int = 0o644) -> None:
        """Write a file; it appears complete or not at all. Parents are created. `root` files are read-only
        to commands and belong below /mnt/session/uploads, /mnt/session/skills or /mnt/memory.

        Raises: LimitHit("disk").
        """
        ...

    async def remove(self, path: str) -> None:
        """Remove a file of `root`, which commands cannot. Repeating is safe."""
        ...

    def get(self, path: str) -> AsyncGenerator[bytes]:
        """Read a file, as the commands' uid. Exhaust or close the iterator.

        Raises: PathNotFound.
        """
        ...

    def take(self, root: str, path: str, *, changing: bool = False) -> AsyncGenerator[bytes]:
        """Read a file below a directory as it is at one moment, as the commands' uid, no link followed. `changing`: also one
        that is written to meanwhile, as far as it went when opened. Exhaust or close the iterator.

        Raises: FileChanging, PathNotFound.
        """
        ...

    async def listing(self, path: str, *, digests: bool = True) -> list[FileEntry]:
        """Return the regular files below a directory (at most 10,000), as the commands' uid. None when it
        is missing.
        """
        ...

    def snapshot(self) -> AsyncGenerator[bytes]:
        """Read a gzip-compressed tar of the session's directories, as far as commands may read them. The shell's state is
        saved before, unless a command runs in it. Exhaust or close the iterator.
        """
        ...

    async def restore(self, stream: AsyncIterable[bytes]) -> None:
        """Unpack what `snapshot` gave, as the commands' uid; for a sandbox that got no call yet.

        Raises: BadArchive, LimitHit("disk").
        """
        ...

    async def aclose(self) -> None:
        """Drop this handle's connections. The sandbox goes on."""
        ...

    async def stop(self) -> None:
        """End its processes, keep its disk. `SandboxBackend.attach` starts it again."""
        ...

    async def destroy(self) -> None:
        """Remove everything of it. Repeating is safe."""
        ...


async def remove_each(orphans: Iterable[SandboxKey], remove: Callable[[str, int], Awaitable[None]]) -> Sequence[SandboxKey]:
    """Remove sandboxes; returns those that could be. One that cannot be is for the next look."""
    removed: list[SandboxKey] = []
    for orphan in orphans:
        try:
            await remove(*orphan)
        except (SandboxError, OSError) as error:
            logger.warning("sandbox %s generation %d cannot be removed: %s", *orphan, error)
        else:
            removed.append(orphan)
    return removed


class SandboxBackend(Protocol):
    """Makes and finds sandboxes of one installation on this host."""

    @property
    def capabilities(self) -> frozenset[Capability]:
        """What is really enforced here."""
        ...

    async def prepare(self, image: str, packages: Packages) -> str:
        """Return the image to provision from: `image` with the packages, installed once per content. May take minutes;
        cancelling gives it up.

        Raises: PackagesFailed.
        """
        ...

    async def provision(self, spec: SandboxSpec) -> Sandbox:
        """Make a sandbox and wait until it takes calls. Repeating attaches to what is there; a half-made
        one is made anew.

        Raises: SandboxError.
        """
        ...

    async def attach(self, id: str) -> Sandbox:  # noqa: A002 - the seam's word
        """Return a handle on the highest generation of `id`, starting it when it is stopped or paused.

        Raises: SandboxGone when there is none.
        """
        ...

    async def pause(self, id: str) -> None:  # noqa: A002
        """Freeze the processes of a sandbox that takes no calls: they keep what they have and get no CPU until `attach`.
        Repeating is safe. Only for a backend with the capability `pause`.

        Raises: SandboxGone when there is none, or it does not run.
        """
        ...

    async def resume(self, id: str) -> None:  # noqa: A002
        """Let a paused sandbox go on; never starts one, and is nothing for one that is not paused."""
        ...

    async def halt(self, id: str) -> bool:  # noqa: A002
        """End what may still run of a sandbox that takes no calls, and let go of what it holds of the host but its disk. Never
        starts it; repeating is safe. False when there is no such sandbox any more.
        """
        ...

    async def list(self) -> Sequence[Labelled]:
        """Return every sandbox of this installation on this host."""
        ...

    async def collect_orphans(self, known: Known) -> Sequence[SandboxKey]:
        """Destroy every sandbox, mount, disk and socket of this installation that is not known; return which. One that cannot be
        destroyed is logged, and keeps no other from it.

        `known` is asked after looking at what there is: a sandbox is recorded before it is made, so one that is being
        made meanwhile is never taken for an orphan.
        """
        ...

    async def collect_images(self) -> None:
        """Remove images with packages that were not used for long, and what broken-off installs left."""
        ...

    async def aclose(self) -> None:
        """Drop connections to the engine. Sandboxes go on."""
        ...
