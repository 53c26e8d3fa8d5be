"""The blob store has no room left: uploads are refused in the API's words, snapshots and outputs wait, and no half blob stays."""

import hashlib
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from anthropic import APIStatusError, AsyncAnthropic
from sqlalchemy import text

from managed_agents.db.engine import Database
from managed_agents.scripted_model import Reply, Request, tool_use
from tests.crash.conftest import Finished
from tests.support import cluster as clusters
from tests.support.cluster import Cluster, Model, make_session, say
from tests.support.following import following
from tests.support.in_flight import BETAS
from tests.support.launcher import Launcher
from tests.support.small_disk import fill, small_disk
from tests.support.waiting import until

pytestmark = pytest.mark.anyio

MIB = 1024 * 1024
ROOM_BYTES = 32 * 1024
WORK = (
    "head -c 100000 /dev/urandom > /mnt/session/outputs/first; echo small > /mnt/session/outputs/small; "
    "head -c 3000000 /dev/urandom > kept; "
    "touch wrote; until [ -e go ]; do sleep 0.02; done; sha256sum < /mnt/session/uploads/kept.bin"
)


@pytest.fixture
def small_store() -> Iterator[Path]:
    with small_disk(8) as directory:
        yield directory


@pytest.fixture
async def cluster(database_url: str, model: Model, launcher: Launcher, small_store: Path) -> AsyncIterator[Cluster]:
    settings = {"blob_store": f"file://{small_store}/blobs", "sandbox_snapshot_seconds": "0.3"}
    async with clusters.cluster(database_url, model, launcher, **settings) as made:
        yield made


def working(request: Request) -> Reply:
    """One command a turn; that of the first waits for the test."""
    if request.round:
        return "done"
    return [tool_use("bash", command=WORK if request.last_user_text == "work" else "wc -c < kept")]


def blobs(store: Path) -> set[str]:
    """Every file of the store; each is what its name says."""
    found = {path for path in (store / "blobs").rglob("*") if path.is_file()}
    for path in found:
        assert path.name == hashlib.sha256(path.read_bytes()).hexdigest(), f"{path} is no whole blob"
    return {path.name for path in found}


async def test_everything_goes_on_without_a_blob_store_and_catches_up(
    cluster: Cluster, client: AsyncAnthropic, db: Database, small_store: Path, finished: Finished
) -> None:
    cluster.model.reply = working
    await cluster.api()
    worker = cluster.worker()
    kept = os.urandom(MIB)
    first = await client.beta.files.upload(file=("kept.bin", kept), betas=BETAS)
    # Too large for what is left: the store fills up in the midst of it.
    with pytest.raises(APIStatusError) as refused:
        await client.beta.files.upload(file=("large.bin", os.urandom(12 * MIB)), betas=BETAS)
    assert refused.value.status_code == 529
    assert refused.value.body == {
        "type": "error",
        "error": {"type": "overloaded_error", "message": "file: the server's storage is full, try again later"},
        "request_id": refused.value.response.headers["request-id"],
    }
    assert blobs(small_store) == {hashlib.sha256(kept).hexdigest()}
    filler = fill(small_store)
    os.truncate(filler, filler.stat().st_size - ROOM_BYTES)
    # What is there can be read.
    session_id = await make_session(client, resources=[{"type": "file", "file_id": first.id, "mount_path": "/kept.bin"}])

    async def outputs() -> list[str]:
        listed = client.beta.files.list(scope_id=session_id, betas=BETAS)
        return [file.filename async for file in listed if file.filename != "kept.bin"]

    async def snapshots() -> int:
        async with db.transaction() as tx:
            query = text("SELECT count(*) FROM sandbox_snapshots WHERE session_id = :id")
            return (await tx.execute(query, {"id": session_id})).scalar_one()

    async with following(client, session_id) as follower:
        await say(client, session_id, "work")
        wrote = await cluster.appeared("wrote")
        await until(lambda: "no snapshot of" in worker.log.read_text())
        await until(lambda: f"outputs of {session_id} not collected: {{'the blob store is full': 1}}" in worker.log.read_text())
        await until(outputs)  # what is small finds the room that the other does not
        wrote.with_name("go").touch()
        await follower.idle()
        assert await finished(session_id)
        assert (await outputs(), await snapshots()) == (["small"], 0)
        assert blobs(small_store) == {hashlib.sha256(content).hexdigest() for content in (kept, b"small\n")}
        filler.unlink()
        # The next turn has room, and makes up for what the last one could not.
        await say(client, session_id, "look")
        await follower.idle(2)
        assert sorted(await outputs()) == ["first", "small"]
    listed = await finished(session_id)
    digest = hashlib.sha256(kept).hexdigest()
    assert [event["content"][0]["text"] for event in listed if event["type"] == "agent.tool_result"] == [
        f"{digest}  -\n",
        "3000000\n",
    ]
    assert not [event for event in listed if event["type"] == "session.error"]
    blobs(small_store)
    await client.beta.files.upload(file=("again.bin", os.urandom(MIB)), betas=BETAS)
    assert "Traceback" not in worker.log.read_text()
