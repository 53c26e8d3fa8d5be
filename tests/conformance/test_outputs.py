"""What sessions leave in their outputs directory: while they work, at idle, and whatever commands put there."""

from typing import Any

import pytest

from managed_agents.core import limits
from managed_agents.harness import outputs as harvesting
from managed_agents.scripted_model import tool_use
from tests.support.stack import BETA, TOOLSET, Gate, Stack
from tests.support.waiting import until

pytestmark = pytest.mark.anyio

OUTPUTS = "/mnt/session/outputs"


async def outputs(server: Stack, session: Any) -> dict[str, bytes]:
    """Name and content of the session's downloadable files."""
    files = [f async for f in server.client.beta.files.list(scope_id=session.id, betas=[BETA]) if f.downloadable]
    assert len({file.filename for file in files}) == len(files)
    return {file.filename: await (await server.client.beta.files.download(file.id)).read() for file in files}


@pytest.mark.requirement("ENV-066")
async def test_an_output_is_a_file_while_the_command_that_wrote_it_still_runs(server: Stack, held: Gate) -> None:
    session = await server.session(
        [[tool_use("bash", command=f"echo early > {OUTPUTS}/a.txt; {held.command}")], "done"], tools=TOOLSET
    )
    async with server.watching(session) as watch:
        await server.say(session, "go")
        await held.started()
        assert await until(lambda: outputs(server, session)) == {"a.txt": b"early\n"}
        assert "agent.tool_result" not in watch.types
        held.open()
        await watch.idle()
    assert await outputs(server, session) == {"a.txt": b"early\n"}


@pytest.mark.requirement("ENV-066")
async def test_each_content_is_one_file(server: Stack) -> None:
    write, again = (f"echo {word} > {OUTPUTS}/a.txt" for word in ("one", "two"))
    calls = [[tool_use("bash", command=command)] for command in (write, f"touch {OUTPUTS}/a.txt", again)]
    session = await server.session([calls[0], "a", calls[1], "b", calls[2], "c"], tools=TOOLSET)
    ids: list[str] = []
    async with server.watching(session) as watch:
        for turn in range(3):
            await server.say(session, "go")
            await watch.idle(turn + 1)
            (file,) = [f async for f in server.client.beta.files.list(scope_id=session.id, betas=[BETA])]
            ids.append(file.id)
    assert ids[0] == ids[1] != ids[2]
    assert await outputs(server, session) == {"a.txt": b"two\n"}


@pytest.mark.requirement("ENV-067")
async def test_odd_files_keep_no_other_from_being_collected(server: Stack) -> None:
    long = "/".join(["d" * 200] * 15)
    # Names come sorted: the good file is behind every odd one.
    script = f"""cd {OUTPUTS}
        ln -s /etc/passwd a-link; ln -s /etc b-link; mkfifo c-pipe; echo no > d-closed; chmod 0 d-closed
        python3 -c 'import os; open(os.fsencode("e-\\udcff"), "w")' 2> /dev/null || touch $'e-\\xff'
        mkdir -p f/{long}; echo no > f/{long}/x
        truncate -s {limits.FILE_BYTES_MAX + 1} g-huge
        mkdir -p 'z/é'; echo yes > 'z/é/fine.txt'; : > 'z/empty.txt'"""
    session = await server.session([[tool_use("bash", command=script)], "done"], tools=TOOLSET)
    await server.turn(session)
    found = await outputs(server, session)
    assert found.pop("d-closed", b"no\n") == b"no\n"  # as root, a command may read what is closed
    assert found == {"fine.txt": b"yes\n", "empty.txt": b""}


@pytest.mark.requirement("ENV-066")
async def test_a_file_that_never_rests_is_taken_when_the_turn_ends(server: Stack) -> None:
    script = f"cd {OUTPUTS}; echo begun > log; (for i in $(seq 3000); do echo line >> log; sleep 0.01; done) > /dev/null 2>&1 &"
    session = await server.session([[tool_use("bash", command=script)], "done"], tools=TOOLSET)
    await server.turn(session)
    assert (await outputs(server, session))["log"].startswith(b"begun\n")


@pytest.mark.requirement("ENV-067")
async def test_outputs_are_bounded_in_number(server: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "OUTPUT_FILES_MAX", 3)
    script = f"cd {OUTPUTS}; for i in 1 2 3 4 5; do echo $i > $i; done"
    more = f"cd {OUTPUTS}; echo new > 3; echo new > 5"
    calls = [[tool_use("bash", command=command)] for command in (script, more)]
    session = await server.session([calls[0], "a", calls[1], "b"], tools=TOOLSET)
    async with server.watching(session) as watch:
        await server.say(session, "go")
        await watch.idle()
        assert await outputs(server, session) == {"1": b"1\n", "2": b"2\n", "3": b"3\n"}
        await server.say(session, "go")
        await watch.idle(2)
    assert await outputs(server, session) == {"1": b"1\n", "2": b"2\n", "3": b"new\n"}


async def test_files_beyond_the_bound_cost_the_log_one_line(
    server: Stack, held: Gate, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(limits, "OUTPUT_FILES_MAX", 2)
    monkeypatch.setattr(harvesting, "LOOK_SECONDS", 0.05)
    script = f"cd {OUTPUTS}; touch $(seq 1 500); {held.command}; echo last > {OUTPUTS}/1"
    session = await server.session([[tool_use("bash", command=script)], "done"], tools=TOOLSET)
    async with server.watching(session) as watch:
        await server.say(session, "go")
        await held.started()
        await until(lambda: outputs(server, session))
        held.open()
        await watch.idle()
    assert (await outputs(server, session))["1"] == b"last\n"
    said = [record.getMessage() for record in caplog.records if "not collected" in record.getMessage()]
    lines = [line for line in said if session.id in line]
    assert lines[-1] == f"outputs of {session.id} not collected: {{'the session has 2 outputs': 498}}"
    assert len(lines) == len(set(lines)) < 20  # the first looks may have seen some of them


async def delete(server: Stack, session: Any, name: str) -> None:
    files = [f async for f in server.client.beta.files.list(scope_id=session.id, betas=[BETA])]
    (file,) = [file for file in files if file.filename == name]
    await server.client.beta.files.delete(file.id)


@pytest.mark.requirement("ENV-095")
async def test_a_deleted_output_comes_back_with_new_content_only(server: Stack) -> None:
    commands = [f"cd {OUTPUTS}; echo one > a; echo other > b", "true", f"touch {OUTPUTS}/a", f"echo two > {OUTPUTS}/a"]
    commands.append(f"echo one > {OUTPUTS}/a")
    replies: list[Any] = []
    for command in commands:
        replies += [[tool_use("bash", command=command)], "done"]
    session = await server.session(replies, tools=TOOLSET)
    await server.turn(session)
    await delete(server, session, "a")
    for _ in range(2):
        await server.turn(session)
        assert await outputs(server, session) == {"b": b"other\n"}
    await server.turn(session)
    assert await outputs(server, session) == {"a": b"two\n", "b": b"other\n"}
    await server.turn(session)
    assert await outputs(server, session) == {"a": b"one\n", "b": b"other\n"}


@pytest.mark.requirement("ENV-095")
async def test_deleting_an_output_makes_room_for_another(server: Stack, held: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "OUTPUT_FILES_MAX", 1)
    script = f"cd {OUTPUTS}; echo 1 > 1; echo 2 > 2; {held.command}"
    session = await server.session([[tool_use("bash", command=script)], "done"], tools=TOOLSET)
    async with server.watching(session) as watch:
        await server.say(session, "go")
        await held.started()
        assert await until(lambda: outputs(server, session)) == {"1": b"1\n"}
        await delete(server, session, "1")
        assert await until(lambda: outputs(server, session)) == {"2": b"2\n"}
        held.open()
        await watch.idle()
    assert await outputs(server, session) == {"2": b"2\n"}
