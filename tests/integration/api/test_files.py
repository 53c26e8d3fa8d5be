"""Files through the SDK, and what the rest of the server builds on them."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import anthropic
import httpx
import pytest
from anthropic import AsyncAnthropic
from sqlalchemy import text

from managed_agents.blobstore.store import BlobRef
from managed_agents.core import limits
from managed_agents.core.errors import NotFound
from managed_agents.core.ids import SESSION, new_id
from managed_agents.reconcilers.blob_collector import BlobCollector
from managed_agents.resources.files import service

from .conftest import Served

pytestmark = pytest.mark.anyio

BETA = "managed-agents-2026-04-01"


def error_of(caught: pytest.ExceptionInfo[Any]) -> dict[str, Any]:
    return caught.value.body["error"]


async def stream(*chunks: bytes) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


async def content(served: Served, blob: BlobRef) -> bytes:
    return b"".join([chunk async for chunk in served.services.blobs.open(blob)])


@pytest.mark.requirement("OBS-032", "OBS-038")
async def test_an_upload_comes_back_as_metadata_only(client: AsyncAnthropic, served: Served) -> None:
    data = bytes(range(256)) * 20_000
    made = await client.beta.files.upload(file=("dir/data.csv", data, "text/csv"))
    shown = made.to_dict()
    assert (shown["filename"], shown["mime_type"], shown["size_bytes"]) == ("data.csv", "text/csv", len(data))
    assert (shown["downloadable"], shown["expires_at"]) == (False, None)
    assert "scope" not in shown
    assert await client.beta.files.retrieve_metadata(made.id) == made
    file = await service.retrieve(served.services.db, served.caller.workspace_id, made.id)
    assert await content(served, file.blob) == data
    with pytest.raises(anthropic.BadRequestError) as refused:
        await client.beta.files.download(made.id)
    assert error_of(refused) == {
        "type": "invalid_request_error",
        "message": f"File '{made.id}' is not downloadable",
        "details": {"error_code": "file_not_downloadable"},
    }


async def test_names_and_types_are_filled_in(client: AsyncAnthropic, served: Served) -> None:
    empty = await client.beta.files.upload(file=("", b"", "text/csv"))
    assert (empty.filename, empty.size_bytes) == ("unnamed.csv", 0)
    guessed = await client.beta.files.upload(file=("C:\\x\\a.png", b"1"))
    assert (guessed.filename, guessed.mime_type) == ("a.png", "image/png")
    unknown = await client.beta.files.upload(file=("grüße", b"1"))
    assert (unknown.filename, unknown.mime_type) == ("grüße", "application/octet-stream")
    for bad in ("a:b", "a|b", "..", "x" * 256):
        with pytest.raises(anthropic.BadRequestError, match="file: filename"):
            await client.beta.files.upload(file=(bad, b"1"))


async def test_expiry_takes_the_bytes_and_later_the_metadata(client: AsyncAnthropic, served: Served) -> None:
    made = await client.beta.files.upload(file=("a", b"1"), expires_in_seconds=3600)
    assert made.expires_at is not None
    assert made.expires_at - made.created_at == timedelta(hours=1)
    for bad in (3599, 7_776_001, -1):
        with pytest.raises(anthropic.BadRequestError, match="expires_in_seconds: "):
            await client.beta.files.upload(file=("a", b"1"), expires_in_seconds=bad)
    db = served.services.db
    async with db.transaction() as tx:
        await tx.execute(text("UPDATE files SET expires_at = now() - interval '1 day', downloadable = true"))
    assert (await client.beta.files.retrieve_metadata(made.id)).id == made.id
    with pytest.raises(anthropic.NotFoundError) as expired:
        await client.beta.files.download(made.id)
    assert error_of(expired)["details"] == {"error_code": "file_expired"}
    async with db.transaction() as tx:
        with pytest.raises(NotFound, match=r"resources\.0\.file_id: "):
            await service.mint_session_copy(tx, served.caller.workspace_id, "sesn_1", made.id, path="resources.0.file_id")
        await tx.execute(text("UPDATE files SET expires_at = now() - interval '31 days'"))
    with pytest.raises(anthropic.NotFoundError):
        await client.beta.files.retrieve_metadata(made.id)


@pytest.mark.requirement("CNV-046")
async def test_both_styles_of_pages(client: AsyncAnthropic, raw: httpx.AsyncClient, served: Served) -> None:
    made = [(await client.beta.files.upload(file=(f"f{index}", b"1"))).id for index in range(5)][::-1]
    assert [file.id async for file in client.beta.files.list(limit=2)] == made
    headers = served.headers(anthropic_beta="files-api-2025-04-14")

    async def page(**query: Any) -> dict[str, Any]:
        answer = await raw.get("/v1/files", params=query, headers=headers)
        assert answer.status_code == 200, answer.text
        shown = answer.json()
        assert (shown["first_id"], shown["last_id"]) == (shown["data"][0]["id"], shown["data"][-1]["id"])
        return {"ids": [file["id"] for file in shown["data"]], "more": shown["has_more"]}

    assert await page(limit=2) == {"ids": made[:2], "more": True}
    assert await page(limit=2, after_id=made[1]) == {"ids": made[2:4], "more": True}
    assert await page(limit=2, after_id=made[3]) == {"ids": made[4:], "more": False}
    assert await page(limit=2, before_id=made[3]) == {"ids": made[1:3], "more": True}
    assert await page(limit=3, before_id=made[3]) == {"ids": made[:3], "more": False}


async def test_ids_select_and_drop_the_unknown(client: AsyncAnthropic) -> None:
    made = [(await client.beta.files.upload(file=(f"f{index}", b"1"))).id for index in range(3)]
    asked = [made[0], made[2], made[0], "file_unknown", "nonsense"]
    page = await client.beta.files.list(ids=asked)
    assert [file.id for file in page.data] == [made[2], made[0]]
    assert page.next_page is None
    with pytest.raises(anthropic.BadRequestError, match="limit: cannot be combined with ids"):
        await client.beta.files.list(ids=made, limit=2)
    with pytest.raises(anthropic.BadRequestError, match="ids: at most 100"):
        await client.beta.files.list(ids=[f"file_{index}" for index in range(101)])


@pytest.mark.requirement("OBS-039")
async def test_copies_and_outputs_belong_to_their_session(client: AsyncAnthropic, served: Served) -> None:
    db, workspace_id, session_id = served.services.db, served.caller.workspace_id, new_id(SESSION)
    original = await client.beta.files.upload(file=("data.csv", b"1,2"))
    async with db.transaction() as tx:
        copy = await service.mint_session_copy(tx, workspace_id, session_id, original.id, path="x")
        with pytest.raises(NotFound):
            await service.mint_session_copy(tx, served.stranger.workspace_id, session_id, original.id, path="x")
    await client.beta.files.delete(original.id)
    assert await content(served, copy.blob) == b"1,2"
    blob = await served.services.blobs.put(stream(b"# Rep", b"ort"), 100)

    async def output(path: str, ref: BlobRef) -> service.File:
        async with db.transaction() as tx:
            return await service.add_output(tx, workspace_id, session_id, output_path=path, mime_type=None, blob=ref)

    first = await output("audit/report.md", blob)
    assert await output("audit/report.md", blob) == first
    listed = [file async for file in client.beta.files.list(scope_id=session_id, betas=[BETA])]
    assert [file.id for file in listed] == [first.id, copy.id]
    assert listed[0].to_dict()["scope"] == {"id": session_id, "type": "session"}
    assert (listed[0].filename, listed[0].mime_type, listed[0].downloadable) == (
        "report.md",
        "text/markdown",
        True,
    )
    downloaded = await client.beta.files.download(first.id)
    assert await downloaded.read() == b"# Report"
    assert downloaded.headers["content-type"].startswith("text/markdown")
    newer = await output("audit/report.md", await served.services.blobs.put(stream(b"new"), 100))
    assert newer.id != first.id
    with pytest.raises(anthropic.NotFoundError):
        await client.beta.files.retrieve_metadata(first.id)
    async with db.transaction() as tx:
        await service.delete_for_session(tx, session_id)
    assert [file async for file in client.beta.files.list(scope_id=session_id, betas=[BETA])] == []


@pytest.mark.requirement("CNV-030")
async def test_the_session_filter_is_gated_and_checked(client: AsyncAnthropic) -> None:
    with pytest.raises(anthropic.BadRequestError, match="scope_id: requires"):
        await client.beta.files.list(scope_id="sesn_1")
    with pytest.raises(anthropic.BadRequestError, match="scope_id: must be"):
        await client.beta.files.list(scope_id="agent_1", betas=[BETA])


@pytest.mark.requirement("CNV-055")
async def test_another_workspace_sees_nothing(client: AsyncAnthropic, stranger: AsyncAnthropic) -> None:
    made = await client.beta.files.upload(file=("a", b"1"))
    texts: set[str] = set()
    for file_id in (made.id, "file_011CZkZAtmR3yMPDzynEDxu7", "agent_1"):
        for call in (
            stranger.beta.files.retrieve_metadata,
            stranger.beta.files.download,
            stranger.beta.files.delete,
        ):
            with pytest.raises(anthropic.NotFoundError) as missing:
                await call(file_id)
            texts.add(error_of(missing)["message"])
    assert texts == {"File not found."}
    assert [file async for file in stranger.beta.files.list()] == []
    deleted = await client.beta.files.delete(made.id)
    assert deleted.to_dict() == {"id": made.id, "type": "file_deleted"}


FILE_PART = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n1\r\n'
BAD_FORMS = [
    ("body: ", FILE_PART),
    ("file: Field required", b"--b--\r\n"),
    ("file: given more than once", FILE_PART + FILE_PART + b"--b--\r\n"),
    (
        "purpose: ",
        b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\n1\r\n' + FILE_PART + b"--b--",
    ),
    ("body: ", b"--b\r\nContent-Disposition: form-data\r\n\r\n1\r\n--b--\r\n"),
    ("file: filename: not valid UTF-8", FILE_PART.replace(b'"a"', b'"\xff"') + b"--b--\r\n"),
    ("body: malformed", b"nonsense"),
    ("body: malformed", FILE_PART.replace(b"\r\n\r\n", b"\r\nX: " + b"x" * 4096 + b"\r\n\r\n") + b"--b--\r\n"),
    ("body: malformed", FILE_PART.replace(b"\r\n\r\n", b"\r\nX: x" * 8 + b"\r\n\r\n") + b"--b--\r\n"),
    ("body: ", b""),
]


@pytest.mark.parametrize(("message", "form"), BAD_FORMS)
async def test_bad_forms_are_refused(raw: httpx.AsyncClient, served: Served, message: str, form: bytes) -> None:
    headers = served.headers(content_type="multipart/form-data; boundary=b")
    answer = await raw.post("/v1/files", content=form, headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith(message)
    assert (await raw.get("/v1/files", headers=served.headers())).json()["data"] == []


@pytest.mark.requirement("CNV-037")
async def test_an_upload_too_large_leaves_nothing(
    raw: httpx.AsyncClient, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "FILE_BYTES_MAX", 3 * 1024 * 1024)

    async def endless() -> AsyncIterator[bytes]:
        yield FILE_PART[:-3]
        for _ in range(70):
            yield b"x" * 65536

    headers = served.headers(content_type="multipart/form-data; boundary=b")
    answer = await raw.post("/v1/files", content=endless(), headers=headers)
    assert answer.status_code == 413
    assert answer.json()["error"]["type"] == "request_too_large"
    future = datetime.now(UTC) + timedelta(hours=1)
    assert [ref async for batch in served.services.blobs.list_before(future) for ref in batch] == []


class Clock:
    """An hour and more passes between two looks of a collector."""

    def __init__(self) -> None:
        self.at = datetime.now(UTC)

    def __call__(self) -> datetime:
        return self.at

    def forward(self, **passed: float) -> None:
        self.at += timedelta(**passed)


async def test_the_collector_spares_what_is_used_or_new(client: AsyncAnthropic, served: Served) -> None:
    db, blobs, now = served.services.db, served.services.blobs, Clock()
    collector = BlobCollector(db, blobs, [service.referenced], now=now)
    used = await client.beta.files.upload(file=("a", b"used"))
    orphan = await blobs.put(stream(b"orphan"), 100)
    assert await collector.look() == 0
    now.forward(hours=2)
    assert await collector.look() == 0
    now.forward(hours=1)
    assert await collector.look() == 1
    assert not await blobs.delete(orphan)
    file = await service.retrieve(db, served.caller.workspace_id, used.id)
    assert await content(served, file.blob) == b"used"


async def test_the_collector_spares_what_was_used_within_the_hour(client: AsyncAnthropic, served: Served) -> None:
    """However old it is: a backup may have dumped the row, and not read the bytes yet."""
    db, blobs, now = served.services.db, served.services.blobs, Clock()
    collector, beginner = (BlobCollector(db, blobs, [service.referenced], now=now) for _ in range(2))
    used = await client.beta.files.upload(file=("a", b"old"))
    blob = (await service.retrieve(db, served.caller.workspace_id, used.id)).blob
    now.forward(days=1)
    assert await collector.look() == 0
    await client.beta.files.delete(used.id)
    for minutes in (1, 30, 29):
        now.forward(minutes=minutes)
        assert await collector.look() == 0
        assert await content(served, blob) == b"old"
    now.forward(minutes=2)
    # Another process does not know since when.
    assert await beginner.look() == 0
    assert await collector.look() == 1


async def test_the_collector_forgets_what_was_used_again_or_not_seen_for_long(client: AsyncAnthropic, served: Served) -> None:
    db, blobs, now = served.services.db, served.services.blobs, Clock()
    collector = BlobCollector(db, blobs, [service.referenced], now=now)
    blob = await blobs.put(stream(b"twice"), 100)
    now.forward(hours=2)
    assert await collector.look() == 0
    # Not listed since: another process removed them, and they were put again.
    now.forward(hours=10)
    assert await collector.look() == 0
    assert await content(served, blob) == b"twice"
    used = await client.beta.files.upload(file=("a", b"twice"))
    now.forward(minutes=30)
    assert await collector.look() == 0
    await client.beta.files.delete(used.id)
    for minutes in (20, 59):
        now.forward(minutes=minutes)
        assert await collector.look() == 0
    now.forward(minutes=2)
    assert await collector.look() == 1
