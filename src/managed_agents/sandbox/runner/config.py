"""What the runner is told at start, as one JSON argument."""

from __future__ import annotations

import json
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Config:
    """Paths are as seen inside the sandbox."""

    socket: str
    """Where to listen. Its directory is closed to the commands' uid."""
    state: str
    """Directory only this uid can read: journal and outcomes."""
    uid: int | None
    """Uid and gid of commands. None (an unprivileged `local` sandbox): the runner's own."""
    workspace: str
    spill: str
    """Writable by commands: where output too large for the model is kept."""
    environment: dict[str, str]
    own_pid_namespace: bool
    """Whether `kill(-1)` reaches this sandbox's processes only."""
    root_owned: list[str] = field(default_factory=list[str])
    """Directories into which files owned by uid 0 may be put. Commands cannot change them."""
    snapshot: dict[str, str] = field(default_factory=dict[str, str])
    """Directories that make up a snapshot, by their names in it. All are the commands' own."""
    quota_bytes: int | None = None
    """What `quota_roots` may take, where the host could not size their disk."""
    quota_roots: list[str] = field(default_factory=list[str])
    limits: dict[str, float] = field(default_factory=dict[str, float])
    """By the names of `backend.Limits`: what the model is told when it hits one; `output_bytes` and `call_seconds` are ours to
    keep.
    """
    own_cgroup: bool = False
    """Whether the counters that the sandbox sees are its own."""
    own_disk: bool = False
    """Whether the workspace lies on a disk of `disk_bytes`."""
    egress_socket: str | None = None
    """Where the host's egress gateway listens for this sandbox. None: there is no way out."""
    proxy_port: int | None = None
    """Loopback port at which commands find it."""
    mapped: dict[str, str] = field(default_factory=dict[str, str])
    """Path prefixes rewritten by the file tools, where the sandbox could not mount the real ones."""

    def to_json(self) -> str:
        return json.dumps(self.__dict__)

    @classmethod
    def from_json(cls, text: str) -> Config:
        return cls(**json.loads(text))

    def resolve(self, path: str) -> str:
        """Return the absolute path the model means by `path`."""
        joined = path if path.startswith("/") else f"{self.workspace}/{path}"
        for prefix, target in self.mapped.items():
            if joined == prefix or joined.startswith(prefix + "/"):
                return target + joined[len(prefix) :]
        return joined
