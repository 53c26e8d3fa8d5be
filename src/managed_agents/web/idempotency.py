"""`Idempotency-Key`, an extension of this server: a changing request sent twice under one key is worked on once.

Invariant: key, fingerprint of the request and answer commit in the transaction that does the work (adr/0014). So a key is on
record exactly if the work was done, whatever died when; a refused request leaves nothing behind and may be corrected under
the same key. The answer is replayed for 24 hours.

Race: two requests with one key at once. Both insert the key first; the second waits in Postgres for the first's commit and
then finds its answer, or, when that takes longer than a lock may, is told to come again.
"""

import hashlib
from collections.abc import Awaitable, Callable, Sequence
from datetime import timedelta
from typing import Any, Protocol, runtime_checkable

from sqlalchemy import func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.exc import DBAPIError
from starlette.requests import Request
from starlette.responses import Response

from managed_agents.core import faults, limits
from managed_agents.core.errors import ApiError, Conflict, InvalidRequest
from managed_agents.db.engine import Tx
from managed_agents.web.actor import Actor
from managed_agents.web.state import edge_services
from managed_agents.web.tables import IdempotencyKeyRow

HEADER = "idempotency-key"
REPLAYED = "idempotent-replayed"
LOCK_NOT_AVAILABLE = "55P03"

COMMITTED = faults.register("idempotency.committed", "work and answer of a keyed request committed, nobody told yet")


@runtime_checkable
class Fingerprinted(Protocol):
    """An argument read by a dependency that belongs to what the caller asked for (an upload)."""

    @property
    def fingerprint(self) -> bytes:
        """Equal for equal requests."""
        ...


async def once(request: Request, parts: Sequence[bytes], work: Callable[[], Awaitable[Response]], *, secret: bool) -> Response:
    """Do `work`, unless its key is on record: then replay the answer.

    `parts` are what the caller asked for, beside method and path. `work` answers 2xx or raises. With `secret` the answer is
    not kept.

    Raises:
        InvalidRequest: not a key. Conflict: the key was used for another request, or its work goes on right now.
    """
    actor: Actor | None = getattr(request.state, "actor", None)
    sent = request.headers.getlist(HEADER)
    if actor is None or not sent:
        return await work()
    key = _checked(sent)
    fingerprint = _fingerprint(request, parts)
    async with edge_services(request).db.unit_of_work() as tx:
        stored = await _claim(tx, actor.workspace_id, key, fingerprint)
        if stored is not None:
            return _replayed(stored, key, fingerprint)
        response = await work()
        assert 200 <= response.status_code < 300, "refusals are raised"
        await tx.execute(
            update(IdempotencyKeyRow)
            .where(IdempotencyKeyRow.workspace_id == actor.workspace_id, IdempotencyKeyRow.key == key)
            .values(
                status=response.status_code,
                media_type=response.media_type,
                answer=None if secret else bytes(response.body),
            )
        )
    faults.reach(COMMITTED)
    return response


def _checked(sent: Sequence[str]) -> str:
    key = sent[0]
    if len(sent) > 1:
        raise InvalidRequest(f"{HEADER}: given more than once")
    if not 1 <= len(key) <= limits.IDEMPOTENCY_KEY_CHARS_MAX:
        raise InvalidRequest(f"{HEADER}: must have 1 to {limits.IDEMPOTENCY_KEY_CHARS_MAX} characters")
    if not (key.isascii() and key.isprintable()):
        raise InvalidRequest(f"{HEADER}: must consist of printable ASCII characters")
    return key


def _fingerprint(request: Request, parts: Sequence[bytes]) -> bytes:
    digest = hashlib.sha256()
    for part in (request.method.encode(), request.url.path.encode("utf-8", "surrogateescape"), *parts):
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.digest()


async def _claim(tx: Tx, workspace_id: str, key: str, fingerprint: bytes) -> Any:
    """Put the key on record, or return the row of who did before. An expired row is taken over."""
    now = func.clock_timestamp()
    statement = insert(IdempotencyKeyRow).values(workspace_id=workspace_id, key=key, fingerprint=fingerprint)
    renewed = {"fingerprint": fingerprint, "status": None, "media_type": None, "answer": None, "created_at": now}
    claim = statement.on_conflict_do_update(
        index_elements=[IdempotencyKeyRow.workspace_id, IdempotencyKeyRow.key],
        set_=renewed,
        where=IdempotencyKeyRow.created_at < now - timedelta(seconds=limits.IDEMPOTENCY_SECONDS),
    ).returning(IdempotencyKeyRow.key)
    try:
        claimed = (await tx.execute(claim)).scalar_one_or_none()
    except DBAPIError as error:
        if getattr(error.orig, "sqlstate", None) != LOCK_NOT_AVAILABLE:
            raise
        raise ApiError(
            409,
            "conflict_error",
            f"{HEADER}: a request with this key is being worked on; repeat it later",
            headers={"retry-after": "1", "x-should-retry": "true"},
        ) from error
    if claimed is not None:
        return None
    # A statement of its own: the one above does not see what it waited for.
    columns = (IdempotencyKeyRow.fingerprint, IdempotencyKeyRow.status, IdempotencyKeyRow.media_type, IdempotencyKeyRow.answer)
    found = select(*columns).where(IdempotencyKeyRow.workspace_id == workspace_id, IdempotencyKeyRow.key == key)
    return (await tx.execute(found)).one()


def _replayed(stored: Any, key: str, fingerprint: bytes) -> Response:
    if stored.fingerprint != fingerprint:
        raise Conflict(f"{HEADER}: {key!r} was used for another request", error_code="idempotency_key_reused")
    if stored.answer is None:
        raise Conflict(
            f"{HEADER}: the request was done, and its answer held a secret that is shown only once",
            error_code="idempotency_answer_not_kept",
        )
    return Response(stored.answer, stored.status, headers={REPLAYED: "true"}, media_type=stored.media_type)
