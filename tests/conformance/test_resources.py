"""Resources of a session: the endpoints, and files that come and go while it lives."""

import hashlib
from typing import Any

import anthropic
import pytest

from managed_agents.blobstore.store import BlobRef
from managed_agents.scripted_model import tool_use
from tests.support.stack import BETA, TOOLSET, Gate, Stack

pytestmark = pytest.mark.anyio

UPLOADS = "/mnt/session/uploads"
SHOW = f"cd {UPLOADS} && for f in $(find . -type f | sort); do echo $f $(cat $f); done"


def shown(watch: Any) -> list[str]:
    """What `SHOW` printed, each time it was called."""
    return [event.content[0].text for event in watch.logged if event.type == "agent.tool_result"]


@pytest.mark.requirement("SES-062")
async def test_what_was_given_at_creation_is_listed_in_order(server: Stack) -> None:
    file = await server.upload(b"abc")
    wanted: list[Any] = [{"type": "file", "file_id": file.id, "mount_path": f"/{n}.txt"} for n in range(12)]
    session = await server.session(resources=wanted)
    resources = server.client.beta.sessions.resources
    listed = [resource async for resource in resources.list(session.id)]
    assert [resource.to_dict() for resource in listed] == [resource.to_dict() for resource in session.resources]
    assert [resource.mount_path for resource in listed] == [each["mount_path"] for each in wanted]  # pyright: ignore
    assert [r.id async for r in resources.list(session.id, limit=5)] == [r.id for r in listed]
    one = await resources.retrieve(listed[3].id, session_id=session.id)
    assert one.to_dict() == listed[3].to_dict()
    assert set(one.to_dict()) == {"id", "type", "file_id", "mount_path", "created_at", "updated_at"}
    assert one.file_id != file.id
    whole = (await server.raw("GET", f"/v1/sessions/{session.id}/resources")).json()
    assert set(whole) == {"data", "next_page"}
    assert whole["next_page"] is None


@pytest.mark.requirement("SES-062")
async def test_a_list_stays_in_order_while_resources_are_added(server: Stack) -> None:
    file = await server.upload()
    session = await server.session(resources=[{"type": "file", "file_id": file.id, "mount_path": f"/{n}"} for n in range(3)])
    path = f"/v1/sessions/{session.id}/resources"
    first = (await server.raw("GET", f"{path}?limit=2")).json()
    added = await server.client.beta.sessions.resources.add(session.id, type="file", file_id=file.id)
    second = (await server.raw("GET", f"{path}?limit=2&page={first['next_page']}")).json()
    assert [r["id"] for r in first["data"] + second["data"]] == [*(r.id for r in session.resources), added.id]
    assert second["next_page"] is None
    assert added.mount_path == f"{UPLOADS}/{file.id}"
    assert [r.id for r in (await server.client.beta.sessions.retrieve(session.id)).resources][-1] == added.id


@pytest.mark.requirement("SES-063", "SES-064")
async def test_files_come_and_go_between_turns(server: Stack) -> None:
    one, two = await server.upload(b"one"), await server.upload(b"two")
    look = [tool_use("bash", command=SHOW)]
    session = await server.session(
        [look, "a", look, "b"], tools=TOOLSET, resources=[{"type": "file", "file_id": one.id, "mount_path": "/in/one.txt"}]
    )
    resources = server.client.beta.sessions.resources
    async with server.watching(session) as watch:
        await server.say(session, "go")
        await watch.idle()
        added = await resources.add(session.id, type="file", file_id=two.id, mount_path="/in/two.txt")
        deleted = await resources.delete(session.resources[0].id, session_id=session.id)
        assert deleted.to_dict() == {"id": session.resources[0].id, "type": "session_resource_deleted"}
        await server.say(session, "go")
        await watch.idle(2)
    assert [text.split("\n")[0] for text in shown(watch)] == ["./in/one.txt one", "./in/two.txt two"]
    requests = server.requests(session)
    assert f"{UPLOADS}/in/one.txt" in requests[0].system
    assert f"{UPLOADS}/in/one.txt" not in requests[-1].system
    assert f"{UPLOADS}/in/two.txt" in requests[-1].system
    # The copy went with the resource, the original stays.
    assert [f.id async for f in server.client.beta.files.list(scope_id=session.id, betas=[BETA])] == [added.file_id]
    assert (await server.client.beta.files.retrieve_metadata(one.id)).id == one.id


@pytest.mark.requirement("SES-064", "SES-110")
async def test_a_mounted_copy_is_deleted_with_its_resource_only(server: Stack) -> None:
    """Deleted as a file, it would leave a resource that names nothing, and a sandbox that cannot be made."""
    file = await server.upload(b"kept")
    look = [tool_use("bash", command=SHOW)]
    session = await server.session(
        [look, "ok"], tools=TOOLSET, resources=[{"type": "file", "file_id": file.id, "mount_path": "/a"}]
    )
    (resource,) = session.resources
    copy = resource.to_dict()["file_id"]
    said = await server.refused("DELETE", f"/v1/files/{copy}")
    assert said.endswith("DELETE /v1/sessions/{session_id}/resources/{resource_id}")
    assert session.id in said
    files, resources = server.client.beta.files, server.client.beta.sessions.resources
    assert [each.to_dict() async for each in resources.list(session.id)] == [resource.to_dict()]
    # The upload may go; the copy serves the sandbox all the same.
    await files.delete(file.id)
    assert shown(await server.turn(session)) == ["./a kept\n"]
    await resources.delete(resource.id, session_id=session.id)
    await server.refused("GET", f"/v1/files/{copy}", status=404)


@pytest.mark.requirement("SES-063")
async def test_a_file_added_while_it_runs_is_there_for_the_next_call(server: Stack, held: Gate) -> None:
    file = await server.upload(b"late")
    calls = [[tool_use("bash", command=held.command)], [tool_use("bash", command=SHOW)], "done"]
    session = await server.session(calls, tools=TOOLSET)
    async with server.watching(session) as watch:
        await server.say(session, "go")
        await held.started()
        await server.client.beta.sessions.resources.add(session.id, type="file", file_id=file.id, mount_path="late.txt")
        held.open()
        await watch.idle()
    assert shown(watch)[-1].startswith("./late.txt late")
    assert watch.types.count("session.status_idle") == 1


async def test_a_file_may_lie_where_a_removed_ones_directory_was(server: Stack) -> None:
    file = await server.upload(b"x")
    look = [tool_use("bash", command=SHOW)]
    session = await server.session(
        [look, "a", look, "b"], tools=TOOLSET, resources=[{"type": "file", "file_id": file.id, "mount_path": "/data/deep/a.csv"}]
    )
    async with server.watching(session) as watch:
        await server.say(session, "go")
        await watch.idle()
        await server.client.beta.sessions.resources.delete(session.resources[0].id, session_id=session.id)
        await server.client.beta.sessions.resources.add(session.id, type="file", file_id=file.id, mount_path="/data")
        await server.say(session, "go")
        await watch.idle(2)
    assert [text.split("\n")[0] for text in shown(watch)] == ["./data/deep/a.csv x", "./data x"]


@pytest.mark.requirement("SES-063")
async def test_a_file_that_cannot_be_mounted_is_told_and_keeps_no_call_from_running(server: Stack) -> None:
    lost, fine = await server.upload(b"these bytes get lost"), await server.upload(b"fine")
    await server.blobs.delete(BlobRef(hashlib.sha256(b"these bytes get lost").hexdigest(), 20))
    session = await server.session(
        [[tool_use("bash", command=SHOW)], "done"],
        tools=TOOLSET,
        resources=[{"type": "file", "file_id": each.id, "mount_path": path} for each, path in ((lost, "/a"), (fine, "/b"))],
    )
    note, _, rest = shown(await server.turn(session))[0].partition("\n")
    assert note.startswith(f"[Mounted files are not up to date: {UPLOADS}/a (")
    assert rest == "./b fine\n"


@pytest.mark.requirement("SES-065")
async def test_what_cannot_be_added(server: Stack) -> None:
    file = await server.upload()
    session = await server.session(resources=[{"type": "file", "file_id": file.id, "mount_path": "/a/b"}])
    path = f"/v1/sessions/{session.id}/resources"

    async def said(body: Any, status: int = 400) -> str:
        return await server.refused("POST", path, status=status, json=body)

    known = {"type": "file", "file_id": file.id}
    assert "github_repository" in await said({"type": "github_repository", "url": "https://github.com/a/b"})
    assert "memory_store" in await said({"type": "memory_store", "memory_store_id": "memstore_01x"})
    assert (await said({**known, "type": "folder"})).startswith("type")
    assert (await said({"type": "file"})).startswith("file_id")
    assert (await said({**known, "access": "read_only"})).startswith("access")
    assert (await said([])).startswith("body")
    assert "file_id: file_01unknown not found" in await said({**known, "file_id": "file_01unknown"}, status=404)
    assert await said({**known, "mount_path": "/a/b"}) == "mount_path: overlaps another resource"
    assert await said({**known, "mount_path": "/a/b/c"}) == "mount_path: overlaps another resource"
    assert "escapes /uploads/" in await said({**known, "mount_path": "/../x"})
    assert len([r async for r in server.client.beta.sessions.resources.list(session.id)]) == 1
    (copy,) = [f async for f in server.client.beta.files.list(scope_id=session.id, betas=[BETA])]
    assert copy.id == session.resources[0].file_id


@pytest.mark.requirement("SES-062")
async def test_at_most_five_hundred(server: Stack) -> None:
    file = await server.upload()
    wanted: list[Any] = [{"type": "file", "file_id": file.id, "mount_path": f"/{n}"} for n in range(500)]
    session = await server.session(resources=wanted)
    path = f"/v1/sessions/{session.id}/resources"
    said = await server.refused("POST", path, json={"type": "file", "file_id": file.id})
    assert "at most 500" in said
    listed = (await server.raw("GET", path)).json()
    assert (len(listed["data"]), listed["next_page"]) == (500, None)
    for bad in ("limit=0", "limit=1001", "page=x", "order=desc"):
        await server.refused("GET", f"{path}?{bad}")


@pytest.mark.requirement("SES-066")
async def test_only_repositories_have_a_token(server: Stack) -> None:
    file = await server.upload()
    session = await server.session(resources=[{"type": "file", "file_id": file.id}])
    with pytest.raises(anthropic.BadRequestError, match="only github_repository resources support token rotation"):
        await server.client.beta.sessions.resources.update(
            session.resources[0].id, session_id=session.id, authorization_token="secret"
        )
    path = f"/v1/sessions/{session.id}/resources/{session.resources[0].id}"
    for body in ({}, {"authorization_token": None}, {"authorization_token": ""}, {"authorization_token": "x", "url": "y"}):
        await server.refused("POST", path, json=body)


@pytest.mark.requirement("SES-067")
async def test_an_archived_session_keeps_its_resources(server: Stack) -> None:
    file = await server.upload()
    session = await server.session(resources=[{"type": "file", "file_id": file.id}])
    await server.client.beta.sessions.archive(session.id)
    path = f"/v1/sessions/{session.id}/resources"
    (resource,) = [r async for r in server.client.beta.sessions.resources.list(session.id)]
    assert "archived" in await server.refused("POST", path, json={"type": "file", "file_id": file.id, "mount_path": "/x"})
    assert "archived" in await server.refused("DELETE", f"{path}/{resource.id}")
    assert (await server.client.beta.sessions.resources.retrieve(resource.id, session_id=session.id)).id == resource.id


@pytest.mark.requirement("SES-068")
async def test_resources_that_are_not_there(server: Stack) -> None:
    file = await server.upload()
    session = await server.session(resources=[{"type": "file", "file_id": file.id}])
    other = await server.session()
    (resource,) = session.resources
    for session_id, resource_id in ((session.id, "sesrsc_01x"), (session.id, "x"), (other.id, resource.id)):
        path = f"/v1/sessions/{session_id}/resources/{resource_id}"
        for method, options in (("GET", {}), ("POST", {"json": {"authorization_token": "x"}}), ("DELETE", {})):
            assert await server.refused(method, path, status=404, **options) == f"Resource {resource_id} not found"
    await server.client.beta.sessions.resources.delete(resource.id, session_id=session.id)
    await server.refused("DELETE", f"/v1/sessions/{session.id}/resources/{resource.id}", status=404)
