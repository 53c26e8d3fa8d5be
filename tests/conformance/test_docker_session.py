"""One whole session in a real container: a file goes in, a report comes out."""

from typing import Any

import anyio
import pytest

from managed_agents.scripted_model import tool_use
from tests.conformance.test_sandbox_life import rows, unowned
from tests.conformance.test_sandbox_places import relieving
from tests.support.stack import BETA, TOOLSET, Variant, stack

pytestmark = [pytest.mark.anyio, pytest.mark.docker]

WORK = r"tr a-z A-Z < /mnt/session/uploads/notes/in.txt > /mnt/session/outputs/out.txt; id -u; cat /proc/1/cmdline | tr '\0' ' '"


async def test_a_session_in_a_container(postgres_url: str, template: str) -> None:
    async with stack(postgres_url, template, sandbox="docker") as server:
        file = await server.upload(b"hello\n", "in.txt")
        replies = [
            [tool_use("bash", command=WORK), tool_use("write", file_path="/workspace/kept.txt", content="kept\n")],
            "first",
            [tool_use("bash", command="cat /workspace/kept.txt; touch /mnt/session/uploads/x")],
            "second",
        ]
        session = await server.session(
            replies, tools=TOOLSET, resources=[{"type": "file", "file_id": file.id, "mount_path": "/notes/in.txt"}]
        )
        first = await server.turn(session)
        assert first.logged[-1].stop_reason.type == "end_turn"
        results = [event for event in first.logged if event.type == "agent.tool_result"]
        assert [result.is_error for result in results] == [False, False]
        said = next(result.content[0].text for result in results if "runner" in result.content[0].text)
        assert int(said.split()[0]) >= 1000

        (output,) = [f async for f in server.client.beta.files.list(scope_id=session.id, betas=[BETA]) if f.downloadable]
        assert output.filename == "out.txt"
        assert await (await server.client.beta.files.download(output.id)).read() == b"HELLO\n"

        second = await server.turn(session, "again")
        (result,) = [event for event in second.logged if event.type == "agent.tool_result"]
        assert result.is_error is True
        assert result.content[0].text.startswith("kept\n")
        assert [e.to_dict() for e in await server.history(session)] == [e.to_dict() for e in first.logged + second.logged]

        await server.client.beta.sessions.delete(session.id)
        await server.reconcile()
        assert await server.backend.list() == []


async def test_a_full_disk_and_a_file_to_mount_leave_a_way_to_make_room(postgres_url: str, template: str) -> None:
    commands = ["head -c 1G /dev/zero > fill", "rm fill; echo room", "cat /mnt/session/uploads/late.txt | wc -c"]
    replies: list[Any] = []
    for command in commands:
        replies += [[tool_use("bash", command=command)], "done"]
    async with stack(postgres_url, template, sandbox="docker") as server:
        file = await server.upload(b"l" * 1024 * 1024)
        session = await server.session(replies, tools=TOOLSET)
        await server.turn(session)
        await server.client.beta.sessions.resources.add(session.id, type="file", file_id=file.id, mount_path="late.txt")
        said = [(await server.turn(session)).logged for _ in range(2)]
    first, second = (next(event for event in logged if event.type == "agent.tool_result") for logged in said)
    assert first.content[0].text.startswith("[Mounted files are not up to date: /mnt/session/uploads/late.txt (")
    assert first.content[0].text.endswith("]\nroom\n")
    assert second.content[0].text == f"{1024 * 1024}\n"


@pytest.mark.requirement("ENV-081")
async def test_a_container_killed_at_rest_gives_its_place_to_who_waits(postgres_url: str, template: str) -> None:
    variant = Variant(settings={"sandbox_running_max": 1})
    async with stack(postgres_url, template, sandbox="docker", variant=variant) as server:
        calls = [[tool_use("bash", command=command)] for command in ("echo kept > file", "cat file", "echo second")]
        first = await server.session([calls[0], "a", calls[1], "b"], tools=TOOLSET)
        second = await server.session([calls[2], "c"], tools=TOOLSET)
        async with server.watching(first) as one, server.watching(second) as two, relieving(server):
            await server.say(first, "go")
            await one.idle()
            await unowned(server, first)
            (row,) = await rows(server, first)
            label = f"label=managed-agents.sandbox={row.id}"
            found = await anyio.run_process(["docker", "ps", "-q", "--filter", label])
            await anyio.run_process(["docker", "kill", *found.stdout.decode().split()])
            await server.say(second, "go")
            await two.idle()
            assert (await two.until("agent.tool_result")).content[0].text == "second\n"
            assert [row.state for row in await rows(server, first)] == ["stopped"]
            assert not list(server.settings.data_dir.glob(f"sandboxes/{row.id}.*/disk/workspace"))  # its disk is not mounted
            await unowned(server, second)
            await server.say(first, "again")
            await one.idle(count=2)
        assert (await one.until("agent.tool_result", count=2)).content[0].text == "kept\n"
