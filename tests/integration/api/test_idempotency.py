"""`Idempotency-Key`: the same request under the same key is worked on once, and answered alike."""

from datetime import timedelta
from typing import Any

import anyio
import httpx
import pytest
from sqlalchemy import func, select, text, update

from managed_agents.core import faults, limits
from managed_agents.db.engine import Database, after_commit
from managed_agents.reconcilers.idempotency_eraser import erase_expired
from managed_agents.web import idempotency
from managed_agents.web.tables import IdempotencyKeyRow
from tests.integration.api.conftest import Served
from tests.support.waiting import until

pytestmark = pytest.mark.anyio

AGENT = {"name": "a", "model": "claude-opus-5"}


async def agents(raw: httpx.AsyncClient, served: Served) -> int:
    return len((await raw.get("/v1/agents", headers=served.headers())).json()["data"])


async def rows(db: Database) -> int:
    async with db.autocommit() as tx:
        return (await tx.execute(select(func.count()).select_from(IdempotencyKeyRow))).scalar_one()


async def create(raw: httpx.AsyncClient, served: Served, key: str, body: Any = AGENT, **more: str) -> httpx.Response:
    return await raw.post("/v1/agents", headers=served.headers(idempotency_key=key, **more), json=body)


@pytest.mark.requirement("CNV-070", "CNV-901")
async def test_the_same_request_is_done_once_and_answered_alike(served: Served, raw: httpx.AsyncClient) -> None:
    first = await create(raw, served, "k")
    again = await create(raw, served, "k")
    assert (first.status_code, again.status_code) == (200, 200)
    assert first.content == again.content
    assert "idempotent-replayed" not in first.headers
    assert again.headers["idempotent-replayed"] == "true"
    assert again.headers["request-id"] != first.headers["request-id"]
    assert again.headers["content-type"] == first.headers["content-type"]
    assert await agents(raw, served) == 1


@pytest.mark.requirement("CNV-072")
async def test_without_the_header_nothing_is_kept(served: Served, raw: httpx.AsyncClient, db: Database) -> None:
    for _ in range(2):
        await raw.post("/v1/agents", headers=served.headers(), json=AGENT)
    assert (await agents(raw, served), await rows(db)) == (2, 0)


@pytest.mark.requirement("CNV-070")
async def test_the_order_of_fields_and_white_space_are_not_another_body(served: Served, raw: httpx.AsyncClient) -> None:
    first = await create(raw, served, "k")
    other = b'{ "model" : "claude-opus-5", "name": "a" }'
    again = await raw.post("/v1/agents", headers=served.headers(idempotency_key="k"), content=other)
    assert again.content == first.content


@pytest.mark.requirement("CNV-071")
async def test_another_request_under_the_key_is_a_conflict(served: Served, raw: httpx.AsyncClient) -> None:
    made = (await create(raw, served, "k")).json()
    headers = served.headers(idempotency_key="k")
    for path, body in (
        ("/v1/agents", {**AGENT, "name": "b"}),
        (f"/v1/agents/{made['id']}", {"name": "b"}),
        (f"/v1/agents/{made['id']}/archive", None),
        ("/v1/environments", {"name": "a"}),
    ):
        answer = await raw.post(path, headers=headers, json=body) if body else await raw.post(path, headers=headers)
        assert answer.status_code == 409, answer.text
        assert answer.json()["error"]["details"]["error_code"] == "idempotency_key_reused"
        assert answer.headers["x-should-retry"] == "false"
    assert await agents(raw, served) == 1


@pytest.mark.requirement("CNV-075")
async def test_a_key_is_its_workspaces_own(served: Served, raw: httpx.AsyncClient) -> None:
    mine = await create(raw, served, "k")
    theirs = await create(raw, served, "k", x_api_key=served.stranger.secret)
    assert theirs.status_code == 200
    assert theirs.json()["id"] != mine.json()["id"]


@pytest.mark.requirement("CNV-075")
async def test_a_refused_request_leaves_its_key_free(served: Served, raw: httpx.AsyncClient, db: Database) -> None:
    assert (await create(raw, served, "k", {"name": "a"})).status_code == 400
    assert (await create(raw, served, "k", {**AGENT, "mcp_servers": [1]})).status_code == 400
    headers = served.headers(idempotency_key="k")
    assert (await raw.delete("/v1/environments/env_01x", headers=headers)).status_code == 404
    assert await rows(db) == 0
    assert (await create(raw, served, "k")).status_code == 200


@pytest.mark.parametrize(
    "key", ["", "x" * (limits.IDEMPOTENCY_KEY_CHARS_MAX + 1), "caf\xe9", "a\tb"], ids=["empty", "long", "latin", "tab"]
)
async def test_what_is_no_key(served: Served, raw: httpx.AsyncClient, key: str) -> None:
    headers = [*served.headers().items(), ("idempotency-key", key.encode("latin-1"))]
    answer = await raw.post("/v1/agents", headers=headers, json=AGENT)  # type: ignore[arg-type]
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith("idempotency-key: ")
    assert await agents(raw, served) == 0


async def test_two_keys_at_once_are_refused(served: Served, raw: httpx.AsyncClient) -> None:
    headers = [*served.headers().items(), ("idempotency-key", "a"), ("idempotency-key", "b")]
    assert (await raw.post("/v1/agents", headers=headers, json=AGENT)).status_code == 400


@pytest.mark.requirement("CNV-075")
async def test_reads_ignore_it(served: Served, raw: httpx.AsyncClient, db: Database) -> None:
    await raw.get("/v1/agents", headers=served.headers(idempotency_key="k"))
    assert await rows(db) == 0


@pytest.mark.requirement("CNV-070")
async def test_an_upload_is_known_by_its_bytes_not_by_its_boundary(served: Served, raw: httpx.AsyncClient) -> None:
    headers = served.headers(without="content-type", idempotency_key="k")
    answers = [
        await raw.post("/v1/files", headers=headers, files={"file": ("a.txt", content, "text/plain")})
        for content in (b"one", b"one", b"two")
    ]
    assert [answer.status_code for answer in answers] == [200, 200, 409]
    assert answers[0].content == answers[1].content


@pytest.mark.requirement("CNV-073")
async def test_of_ten_at_once_one_works_and_all_get_its_answer(served: Served, raw: httpx.AsyncClient) -> None:
    answers: list[httpx.Response] = []

    async def one() -> None:
        answers.append(await create(raw, served, "k"))

    async with anyio.create_task_group() as group:
        for _ in range(10):
            group.start_soon(one)
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.content for answer in answers}) == 1
    assert sum("idempotent-replayed" not in answer.headers for answer in answers) == 1
    assert await agents(raw, served) == 1


@pytest.mark.requirement("CNV-073")
async def test_whoever_waits_too_long_is_told_to_come_again(served: Served, raw: httpx.AsyncClient, db: Database) -> None:
    async with db.transaction() as tx:
        await tx.execute(
            IdempotencyKeyRow.__table__.insert().values(  # type: ignore[attr-defined]
                workspace_id=served.caller.workspace_id, key="k", fingerprint=b""
            )
        )
        answer = await create(raw, served, "k")
        await tx.rollback()
    assert answer.status_code == 409
    assert (answer.headers["x-should-retry"], answer.headers["retry-after"]) == ("true", "1")
    assert (await create(raw, served, "k")).status_code == 200


@pytest.mark.requirement("CNV-074")
async def test_work_whose_answer_cannot_be_kept_is_undone(served: Served, raw: httpx.AsyncClient, db: Database) -> None:
    async with db.transaction() as tx:
        await tx.execute(text("ALTER TABLE idempotency_keys ADD CONSTRAINT never CHECK (answer IS NULL) NOT VALID"))
    assert (await create(raw, served, "k")).status_code == 500
    assert await agents(raw, served) == 0
    async with db.transaction() as tx:
        await tx.execute(text("ALTER TABLE idempotency_keys DROP CONSTRAINT never"))
    assert (await create(raw, served, "k")).status_code == 200


async def test_keys_expire_and_are_removed_in_chunks(served: Served, raw: httpx.AsyncClient, db: Database) -> None:
    first = await create(raw, served, "old")
    for number in range(5):
        await create(raw, served, f"older {number}")
    past = func.clock_timestamp() - timedelta(seconds=limits.IDEMPOTENCY_SECONDS + 1)
    async with db.transaction() as tx:
        await tx.execute(update(IdempotencyKeyRow).values(created_at=past))
    # Expired, though still there: worked on again.
    second = await create(raw, served, "old", {**AGENT, "name": "b"})
    assert (second.status_code, second.json()["id"] != first.json()["id"]) == (200, True)
    assert "idempotent-replayed" not in second.headers
    assert await erase_expired(db, chunk=2) == 5
    assert (await create(raw, served, "old", {**AGENT, "name": "b"})).content == second.content


@pytest.mark.requirement("CNV-074")
async def test_nobody_is_told_before_the_commit(served: Served, db: Database) -> None:
    told: list[str] = []
    async with db.unit_of_work():
        async with db.transaction() as tx:
            await tx.execute(text("SELECT 1"))
        after_commit(lambda: told.append("inside"))
        assert told == []
    assert told == ["inside"]
    with pytest.raises(ZeroDivisionError):
        async with db.unit_of_work():
            after_commit(lambda: told.append("never"))
            raise ZeroDivisionError
    assert told == ["inside"]
    after_commit(lambda: told.append("outside"))
    assert told == ["inside", "outside"]


@pytest.mark.requirement("CNV-074")
async def test_a_caller_that_went_away_after_the_commit_gets_the_answer_later(served: Served, raw: httpx.AsyncClient) -> None:
    """The process survives, the connection does not; killing the process is a crash test."""
    reached: list[bool] = []

    def cut() -> None:
        reached.append(True)
        raise ConnectionError("the connection broke")

    faults.arm(idempotency.COMMITTED, cut)
    assert (await create(raw, served, "k")).status_code == 529
    await until(lambda: bool(reached), seconds=10)
    again = await create(raw, served, "k")
    assert (again.status_code, again.headers["idempotent-replayed"]) == (200, "true")
    assert await agents(raw, served) == 1
