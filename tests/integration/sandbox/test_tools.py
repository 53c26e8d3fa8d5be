"""The six tools, on every backend."""

import base64
import json
from collections.abc import Callable
from typing import Any

import anyio
import pytest

from managed_agents.sandbox.backend import Sandbox
from tests.integration.sandbox.contract import KINDS, SIZED, new_call, only, text

pytestmark = [pytest.mark.anyio, pytest.mark.docker]
Run = Callable[..., Any]
PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==")


@pytest.mark.requirement("ENV-033")
async def test_bash_keeps_directory_and_variables(run: Run) -> None:
    await run("bash", command="mkdir -p /tmp/keep && cd /tmp/keep && X=5 && f() { echo f$X; }")
    assert text(await run("bash", command="pwd; echo $X; f")) == "/tmp/keep\n5\nf5\n"
    assert text(await run("bash", restart=True)) == "bash session restarted"
    assert text(await run("bash", command="echo [$X]; basename $PWD")) == "[]\nworkspace\n"


async def test_bash_combines_both_outputs_and_reports_the_exit_code(run: Run) -> None:
    outcome = await run("bash", command="echo out; echo err >&2; false")
    assert outcome.is_error
    assert text(outcome) == "out\nerr\nExit code 1"
    assert not (await run("bash", command="true")).is_error


@pytest.mark.parametrize(
    ("command", "shown", "is_error"),
    [
        ("exit 3", "Exit code 3. The shell ended and was restarted.", True),
        ("exit 0", "", False),
        ("exec echo replaced", "replaced\n", False),
        ("kill -9 $$", "killed by signal 9", True),
        ("cat", "", False),
        ("printf no-newline", "no-newline", False),
        ("printf '\\377\\376'", "\ufffd\ufffd", False),
        ("echo 'unclosed", "unexpected EOF", True),
        ("sleep 300 & echo started", "started\n", False),
        ("exec >/dev/null", "", False),
        ("set -e; false", "Exit code 1", True),
        ("unset __commands __status __output", "restarted", True),
        ("enable -n eval read; false", "Exit code 1", True),
        ("exec 3>&1; echo three >&3", "three\n", False),
        ("ls -l /proc/self/fd | grep -c pipe", "2\n", False),
    ],
)
async def test_bash_survives(run: Run, command: str, shown: str, is_error: bool) -> None:
    with anyio.fail_after(20):
        outcome = await run("bash", command=command)
        assert shown in text(outcome)
        assert outcome.is_error == is_error
        assert text(await run("bash", command="echo alive")).endswith("alive\n")
    await run("bash", restart=True)


async def test_bash_times_out_with_what_was_printed(run: Run) -> None:
    with anyio.fail_after(20):
        outcome = await run("bash", command="echo partial; sleep 300", timeout_ms=300)
    assert outcome.is_error
    assert text(outcome).startswith("partial\nCommand timed out after 0.3 s")
    assert text(await run("bash", command="echo alive")) == "alive\n"


async def test_bash_refuses_what_is_no_command(run: Run) -> None:
    for arguments in ({}, {"command": 5}, {"command": "a\0b"}, {"command": "true", "timeout_ms": -1}):
        assert (await run("bash", **arguments)).is_error


async def test_bash_takes_a_long_script(run: Run) -> None:
    script = "cat <<'END' | wc -c\n" + "x" * 200_000 + "\nEND\n"
    with anyio.fail_after(30):
        assert text(await run("bash", command=script)).strip() == "200001"


@pytest.mark.requirement("OBS-043")
async def test_large_output_is_a_preview_and_a_file_the_command_can_read(run: Run) -> None:
    outcome = await run("bash", command="seq 1 200000")
    shown = text(outcome)
    assert len(shown) <= 100_000
    assert len(shown.encode()) <= 100 * 1024
    assert shown.startswith("1\n2\n")
    assert shown.endswith("200000\n")
    assert outcome.spill_path in shown
    assert text(await run("bash", command=f"seq 1 200000 | cmp - {outcome.spill_path} && echo same")) == "same\n"


async def test_output_just_below_the_bound_is_whole(run: Run) -> None:
    outcome = await run("bash", command="head -c 100000 /dev/zero | tr '\\0' x")
    assert text(outcome) == "x" * 100_000
    assert outcome.spill_path is None
    over = await run("bash", command="head -c 100001 /dev/zero | tr '\\0' x")
    assert over.spill_path is not None


@pytest.mark.requirement("OBS-043")
@only(*(kind for kind in KINDS if kind not in SIZED))  # on a sized disk the disk's bound is hit first: test_disk_is_bounded
async def test_endless_output_is_bounded(run: Run) -> None:
    outcome = await run("bash", command="head -c 70000000 /dev/zero | tr '\\0' y")
    assert f"the first {64 * 1024 * 1024} bytes are in" in text(outcome)
    size = text(await run("bash", command=f"stat -c %s {outcome.spill_path}; rm {outcome.spill_path}"))
    assert int(size) == 64 * 1024 * 1024


async def test_write_read_edit(run: Run) -> None:
    assert not (await run("write", file_path="new/dir/a.txt", content="one\ntwo\nthree\n")).is_error
    assert text(await run("read", file_path="/workspace/new/dir/a.txt")) == "one\ntwo\nthree\n"
    assert text(await run("read", file_path="new/dir/a.txt", view_range=[2, 2])) == "two\n"
    assert text(await run("read", file_path="new/dir/a.txt", view_range=[2, -1])) == "two\nthree\n"
    assert not (await run("edit", file_path="new/dir/a.txt", old_string="two", new_string="2")).is_error
    assert "not found" in text(await run("edit", file_path="new/dir/a.txt", old_string="two", new_string="2"))
    twice = await run("edit", file_path="new/dir/a.txt", old_string="e\n", new_string="E\n")
    assert twice.is_error
    assert "2 times" in text(twice)
    await run("edit", file_path="new/dir/a.txt", old_string="e\n", new_string="E\n", replace_all=True)
    assert text(await run("read", file_path="new/dir/a.txt")) == "onE\n2\nthreE\n"
    assert text(await run("bash", command="stat -c %a new/dir/a.txt")) == "644\n"


async def test_read_gives_images_documents_and_notebooks(run: Run, shared: Sandbox) -> None:
    await shared.put("/workspace/p.png", PNG, "agent")
    [image] = (await run("read", file_path="p.png")).content
    assert image["type"] == "image"
    assert base64.b64decode(image["source"]["data"]) == PNG
    assert (await run("read", file_path="p.png", view_range=[1, 2])).is_error
    await shared.put("/workspace/d.pdf", b"%PDF-1.4\nrest", "agent")
    [document] = (await run("read", file_path="d.pdf")).content
    assert document["type"] == "document"
    await shared.put("/workspace/fake.png", b"not an image", "agent")
    assert (await run("read", file_path="fake.png")).is_error
    await shared.put("/workspace/sound.webp", b"RIFF\x04\x00\x00\x00WAVE", "agent")
    assert (await run("read", file_path="sound.webp")).is_error
    await shared.put("/workspace/image.webp", b"RIFF\x04\x00\x00\x00WEBP", "agent")
    [image] = (await run("read", file_path="image.webp")).content
    assert image["source"]["media_type"] == "image/webp"
    cells = [{"cell_type": "code", "source": ["print(", "1)"], "outputs": [{"text": ["1\n"]}]}]
    await shared.put("/workspace/n.ipynb", json.dumps({"cells": cells}).encode(), "agent")
    assert "print(1)" in text(await run("read", file_path="n.ipynb"))


async def test_what_file_tools_say_too_much_of_is_a_preview_and_a_file(run: Run) -> None:
    await run("bash", restart=True)
    await run(
        "bash", command="seq 1 30000 > numbers; head -c 100000 /dev/zero | tr '\\0' x > just; yes longer | head -9000 > yes"
    )
    whole = text(await run("read", file_path="just"))
    assert whole == "x" * 100_000
    for name, arguments in (("read", {"file_path": "numbers"}), ("grep", {"pattern": "longer", "path": "yes"})):
        shown = text(await run(name, **arguments))
        assert len(shown) < 70_000
        path = shown.partition("the full output is in ")[2].partition("]")[0]
        assert "/tool_outputs/" in path
        if name == "read":
            assert shown.startswith("1\n2\n")
            assert shown.endswith("30000\n")
            assert text(await run("bash", command=f"cmp {path} numbers && echo same")) == "same\n"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"file_path": "/no/such"}, "No such file"),
        ({"file_path": "/workspace"}, "not a regular file"),
        ({"file_path": "/dev/zero"}, "not a regular file"),
        ({"file_path": "/workspace/fifo"}, "not a regular file"),
        ({"file_path": "/workspace/big"}, "use view_range"),
        ({"file_path": "/workspace/binary"}, "binary"),
        ({"file_path": "/etc/shadow"}, "Permission denied"),
        ({}, "file_path is required"),
        ({"file_path": "x", "view_range": [3]}, "view_range"),
        ({"file_path": "x", "view_range": [0, 1]}, "view_range"),
    ],
)
async def test_read_refuses(run: Run, arguments: dict[str, Any], reason: str) -> None:
    setup = "[ -e fifo ] || mkfifo fifo; head -c 300000 /dev/zero | tr '\\0' x > big; "
    await run("bash", restart=True)
    await run("bash", command=setup + "head -c 100 /dev/zero > binary")
    with anyio.fail_after(20):
        outcome = await run("read", **arguments)
    assert outcome.is_error
    assert reason in text(outcome)


@pytest.mark.requirement("OBS-042")
@pytest.mark.requirement("OBS-056")
@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("[a", "unclosed character class; missing ']'"),
        ("src/*.p[", "unclosed character class; missing ']'"),
        ("[]", "unclosed character class; missing ']'"),
        ("[!]", "unclosed character class; missing ']'"),
        ("[b-a]", "invalid range; 'b' > 'a'"),
        ("*.{py,txt", "unclosed alternate group; missing '}' (maybe escape '{' with '[{]'?)"),
        ("a\\", "dangling '\\'"),
    ],
)
async def test_a_pattern_that_means_nothing_is_refused_in_ripgrep_s_words(run: Run, pattern: str, said: str) -> None:
    outcome = await run("glob", pattern=pattern)
    assert (text(outcome), outcome.is_error) == (f"error parsing glob '{pattern}': {said}", True)


async def test_glob_is_newest_first_and_recurses(run: Run) -> None:
    await run("bash", command="rm -rf g; mkdir -p g/sub && cd g && "
              "touch -d '3 hours ago' old.py && touch -d '1 hour ago' sub/new.py && touch x.txt")  # fmt: skip
    found = [line.rsplit("/g/")[1] for line in text(await run("glob", pattern="*.py", path="g")).split("\n")]
    assert found == ["sub/new.py", "old.py"]
    assert text(await run("glob", pattern="g/*.py")).endswith("/g/old.py")
    assert text(await run("glob", pattern="/workspace/g/**/*.{txt,py}")).count("\n") == 2
    assert text(await run("glob", pattern="*.nothing")) == "No files found"
    assert (await run("glob", pattern="*", path="/no/such")).is_error
    await run("bash", command="mkdir many && cd many && touch $(seq 1 150)")
    assert len(text(await run("glob", pattern="g/many/*")).split("\n")) == 100


@pytest.mark.requirement("OBS-049")
async def test_grep(run: Run) -> None:
    script = (
        "rm -rf s; mkdir s && cd s && echo needle one > a; echo other > b; yes needle | head -20000 > c; "
        "(head -c 3000 /dev/zero | tr '\\0' n; echo needle) > long"
    )
    await run("bash", restart=True)
    await run("bash", command=script)
    assert text(await run("grep", pattern="n.edle one", path="s")).endswith("/s/a:1:needle one")
    assert text(await run("grep", pattern="absent", path="s")) == "No matches found"
    assert max(map(len, text(await run("grep", pattern="needle", path="s/long")).split("\n"))) < 2100
    assert len(text(await run("grep", pattern="needle", path="s")).encode()) <= 101 * 1024
    assert (await run("grep", pattern="(", path="s")).is_error
    assert (await run("grep", pattern="x", path="/no/such")).is_error


async def test_unknown_tools_and_wrong_types_are_outcomes(run: Run) -> None:
    assert (await run("no_such_tool")).is_error
    assert (await run("write", file_path=["x"], content="y")).is_error
    assert (await run("write", file_path="surrogate", content="\udc80")).is_error is False


async def test_other_tools_run_beside_a_long_command(run: Run, shared: Sandbox) -> None:
    await run("bash", restart=True)
    slow = new_call("bash", command="until [ -e go ]; do sleep 0.02; done; echo went")
    with anyio.fail_after(30):
        async with anyio.create_task_group() as group:
            group.start_soon(shared.execute, slow)
            await run("read", file_path="/workspace/nothing")
            await run("write", file_path="go", content="")
        assert text(await shared.collect(slow.tool_use_id, 1)) == "went\n"


async def test_twenty_calls_at_once(run: Run) -> None:
    with anyio.fail_after(60):
        async with anyio.create_task_group() as group:
            for number in range(20):
                arguments = {"command": f"echo {number}"} if number % 2 else {"pattern": "*.none"}
                group.start_soon(lambda a=arguments: run("bash" if "command" in a else "glob", **a))
