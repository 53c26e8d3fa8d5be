"""GitHub repositories of a session: where they are mounted, their sealed tokens, and what became of them in its sandbox.

A token is sealed before it is stored, bound to its resource, and opened by the egress gateway for one request at a time. Nothing
else reads it: not the API's answers, not the harness, not the sandbox.
"""

import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

import orjson
from pydantic import SecretStr
from sqlalchemy import insert, text

from managed_agents.core import ids
from managed_agents.core.errors import InvalidRequest
from managed_agents.core.ids import WorkspaceId
from managed_agents.db.engine import Tx
from managed_agents.encryption.sealing import Sealing
from managed_agents.resources.sessions.schemas import GithubRepository
from managed_agents.resources.sessions.tables import RESOURCES

WORKSPACE = "/workspace"
HOME = "/home/agent"
PATH_CHARS_MAX = 1024
NAME_BYTES_MAX = 255
ErrorType = Literal[
    "repository_authentication_error",
    "repository_forbidden_error",
    "repository_not_found_error",
    "repository_checkout_error",
    "repository_clone_error",
]

_OF_SESSION = text("""
    SELECT id, sandbox_path, body, sealed_token IS NOT NULL AS has_token, token_fingerprint FROM session_resources
    WHERE session_id = :session_id AND type = 'github_repository' ORDER BY created_at, id
""")
_TOKEN = text("""
    SELECT sealed_token FROM session_resources
    WHERE id = :id AND session_id = :session_id AND type = 'github_repository'
""")
_STATE = text("SELECT repositories FROM sandboxes WHERE id = :id")
_SET_STATE = text("UPDATE sandboxes SET repositories = repositories || CAST(:state AS jsonb) WHERE id = :id")
_TOLD = text("""
    UPDATE sandboxes SET repositories = jsonb_set(repositories, ARRAY[CAST(:resource_id AS text), 'told'], 'true')
    WHERE id = :id AND repositories ? CAST(:resource_id AS text)
""")
# In every sandbox: one restored later has the states of the one of which the snapshot is. A branch or commit that the host does
# not have is nothing that a token changes, and its clone is there.
_TRY_AGAIN = text("""
    UPDATE sandboxes SET repositories = jsonb_set(repositories, ARRAY[CAST(:resource_id AS text)],
        (repositories -> CAST(:resource_id AS text)) || jsonb_build_object('again', true, 'attempt',
            coalesce(CAST(repositories -> CAST(:resource_id AS text) ->> 'attempt' AS integer), 0) + 1))
    WHERE session_id = :session_id AND repositories -> CAST(:resource_id AS text) ->> 'error' <> 'repository_checkout_error'
""")
# What was restored into a sandbox is what the one had of which the snapshot is.
_INHERIT = text("""
    UPDATE sandboxes b SET repositories = coalesce((SELECT p.repositories FROM sandboxes p
        WHERE p.session_id = b.session_id AND p.generation = :generation), '{}')
    WHERE b.id = :id
""")


@dataclass(frozen=True, slots=True)
class Repository:
    """A repository to be cloned. `branch` or `sha` is what to check out; neither: the default branch."""

    id: str
    url: str
    path: str
    branch: str | None = None
    sha: str | None = None
    has_token: bool = False
    token_fingerprint: str | None = None


@dataclass(frozen=True, slots=True)
class State:
    """What became of a repository in a sandbox; `error` is null for one that was cloned."""

    error: ErrorType | None = None
    message: str = ""
    told: bool = False
    """Clients know of the error."""
    attempt: int = 0
    """Which clone this was, or is to be."""
    again: bool = False
    """It failed, and is to be tried again: the token is another one."""


def identity(resource_id: str) -> str:
    """What a resource's sealed token is bound to."""
    return f"session_resources/{resource_id}/authorization_token"


def clone_path(wanted: GithubRepository, prefix: str) -> str:
    """Where a repository is cloned to, in the sandbox.

    Raises InvalidRequest naming the field: not below a directory that commands may write to and snapshots hold.
    """
    if wanted.mount_path is None:
        return f"{WORKSPACE}/{wanted.url.rsplit('/', 1)[1]}"
    given = wanted.mount_path
    if len(given) > PATH_CHARS_MAX:
        raise InvalidRequest(f"{prefix}mount_path: at most {PATH_CHARS_MAX} characters are allowed")
    parts = given.split("/")
    path = posixpath.normpath(given) if given else ""
    beneath = any(path == root or path.startswith(root + "/") for root in (WORKSPACE, HOME))
    if not beneath or ".." in parts or any(ord(char) < 32 for char in given) or path == HOME:
        raise InvalidRequest(f"{prefix}mount_path: a repository is mounted at or below {WORKSPACE}, or below {HOME}")
    if any(len(part.encode(errors="replace")) > NAME_BYTES_MAX for part in parts):
        raise InvalidRequest(f"{prefix}mount_path: a name in it is longer than {NAME_BYTES_MAX} bytes")
    return path


async def mount(
    tx: Tx,
    workspace_id: WorkspaceId,
    session_id: str,
    wanted: GithubRepository,
    path: str,
    at: datetime,
    *,
    sealing: Sealing,
) -> None:
    """Record a repository at `path`, its token sealed."""
    resource_id = ids.new_id(ids.SESSION_RESOURCE)
    columns = {}
    if wanted.authorization_token is not None:
        columns = sealed_token(sealing, workspace_id, resource_id, wanted.url, wanted.authorization_token)
    await tx.execute(
        insert(RESOURCES).values(
            id=resource_id,
            session_id=session_id,
            type="github_repository",
            sandbox_path=path,
            body={
                "url": wanted.url,
                "mount_path": path if wanted.mount_path is None else wanted.mount_path,
                "checkout": None if wanted.checkout is None else wanted.checkout.model_dump(),
            },
            **columns,
            created_at=at,
            updated_at=at,
        )
    )


def sealed_token(
    sealing: Sealing, workspace_id: WorkspaceId, resource_id: str, url: str, given: SecretStr
) -> dict[str, bytes | str]:
    """The columns that hold a token: sealed, and as what it can be compared by."""
    return {
        "sealed_token": sealing.seal(given, identity(resource_id)),
        "token_fingerprint": sealing.fingerprint(given, f"{workspace_id}/{url}"),
    }


async def of_session(tx: Tx, session_id: str) -> list[Repository]:
    """The session's repositories, in the order in which they were given."""
    found: list[Repository] = []
    for row in await tx.execute(_OF_SESSION, {"session_id": session_id}):
        checkout: Mapping[str, str] = row.body["checkout"] or {}
        found.append(
            Repository(
                row.id,
                row.body["url"],
                row.sandbox_path,
                branch=checkout.get("name"),
                sha=checkout.get("sha"),
                has_token=row.has_token,
                token_fingerprint=row.token_fingerprint,
            )
        )
    return found


async def token(tx: Tx, session_id: str, resource_id: str, *, sealing: Sealing) -> SecretStr | None:
    """The token of a repository; None without one. Raises SealBroken."""
    sealed: bytes | None = (await tx.execute(_TOKEN, {"id": resource_id, "session_id": session_id})).scalar_one_or_none()
    return None if sealed is None else sealing.open(bytes(sealed), identity(resource_id))


# In a sandbox


async def states(tx: Tx, sandbox_id: str) -> dict[str, State]:
    """What became of repositories in a sandbox so far, by resource."""
    found: Mapping[str, Any] = (await tx.execute(_STATE, {"id": sandbox_id})).scalar_one_or_none() or {}
    return {resource_id: State(**state) for resource_id, state in found.items()}


async def set_states(tx: Tx, sandbox_id: str, changed: Mapping[str, State]) -> None:
    """Record what became of some repositories."""
    state = {
        key: {"error": one.error, "message": one.message, "told": one.told} | ({"attempt": one.attempt} if one.attempt else {})
        for key, one in changed.items()
    }
    await tx.execute(_SET_STATE, {"id": sandbox_id, "state": orjson.dumps(state).decode()})


async def set_told(tx: Tx, sandbox_id: str, resource_id: str) -> None:
    """Record that clients know what became of a repository."""
    await tx.execute(_TOLD, {"id": sandbox_id, "resource_id": resource_id})


async def try_again(tx: Tx, session_id: str, resource_id: str) -> None:
    """Have the session's next turn clone a repository whose clone failed."""
    await tx.execute(_TRY_AGAIN, {"session_id": session_id, "resource_id": resource_id})


async def inherit_states(tx: Tx, sandbox_id: str, generation: int) -> None:
    """Take over what became of repositories in the sandbox of `generation`, whose snapshot was restored into this one."""
    await tx.execute(_INHERIT, {"id": sandbox_id, "generation": generation})


def described(wanted: Sequence[Repository]) -> list[str]:
    """A line for each repository, for the model."""
    lines: list[str] = []
    for one in wanted:
        checkout = f", branch {one.branch}" if one.branch else f", commit {one.sha}" if one.sha else ""
        lines.append(f"{one.path} ({one.url}{checkout})")
    return lines
