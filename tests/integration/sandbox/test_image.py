"""Images in sandboxes as sessions get them: the slim one shows what it should, the full one too, what an image sets is there."""

from dataclasses import replace

import pytest

from managed_agents.sandbox import image
from managed_agents.sandbox.distribution import run
from managed_agents.sandbox.image_reference import failures, load
from tests.integration.sandbox.contract import Bench, new_call, only, text

pytestmark = [pytest.mark.anyio, pytest.mark.docker]
ROWS = load(image.dockerfile_directory() / "reference.toml")
IN_USE = "In use"
FULL_SECONDS = 2 * image.RECIPES["full"].seconds


def test_an_image_that_is_current_is_not_built_again() -> None:
    said: list[str] = []
    assert image.build(progress=said.append) is False
    assert said == ["managed-agents-sandbox:latest is there and current"]
    assert image.column(image.IMAGE, "slim") == "slim"


async def test_the_slim_image_shows_what_the_reference_says_of_it() -> None:
    seen: list[str] = []
    rows = [row for row in ROWS if row.property != IN_USE]
    assert await failures(image.IMAGE, rows, "slim", progress=seen.append) == []
    assert len(seen) == len([row for row in rows if row.pattern("slim") is not None]) >= 17


async def test_what_is_missing_is_named() -> None:
    rows = [row for row in ROWS if row.name in ("ffmpeg", "jq")]
    [failure] = await failures(image.IMAGE, rows, "registry", progress=lambda _: None)
    assert failure.startswith("Documents: ffmpeg: not /^ffmpeg version/ but: ")


@pytest.mark.requirement("ENV-084")
@only("docker")
async def test_what_an_image_sets_is_in_the_environment_of_commands(bench: Bench) -> None:
    name = f"managed-agents-test-variables:{bench.installation}"
    made = run(
        ["docker", "create", "--label", f"managed-agents.installation={bench.installation}", image.IMAGE], 60
    ).stdout.strip()
    try:
        changes = ["--change=ENV TOOL_HOME=/opt/tool", "--change=ENV PATH=/opt/tool/bin:/usr/bin:/bin"]
        assert run(["docker", "commit", *changes, made, name], 60).returncode == 0
        sandbox = await bench.backend().provision(replace(bench.spec(), image=name))
        shown = text(
            await sandbox.execute(new_call("bash", command="echo $TOOL_HOME $GIVEN; echo $PATH; python3 -c 'print(6*7)'"))
        )
        await sandbox.destroy()
    finally:
        run(["docker", "rm", "-f", made], 60)
        run(["docker", "image", "rm", "-f", name], 60)
    first, path, last = shown.splitlines()
    assert (first, last) == ("/opt/tool yes", "42")
    assert "/home/agent/.gem/bin:/opt/tool/bin:/usr/bin:/bin:" in path


@pytest.mark.full
async def test_the_slim_image_in_use() -> None:
    rows = [row for row in ROWS if row.property == IN_USE]
    assert await failures(image.IMAGE, rows, "slim", progress=print) == []


@pytest.mark.full
@pytest.mark.timeout(FULL_SECONDS)
@pytest.mark.requirement("ENV-083")
async def test_the_full_image_shows_what_the_reference_says_of_it() -> None:
    image.build(variant="full", progress=print)  # at once when it is there
    name = image.RECIPES["full"].image
    assert await failures(name, ROWS, image.column(name, "full"), progress=print) == []
