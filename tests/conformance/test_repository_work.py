"""Repositories in real containers: cloned, pulled and pushed through the gateway, from a git host with passwords over HTTPS."""

import base64
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from managed_agents.resources.sessions import bindings
from tests.conformance.test_sandbox_life import collector
from tests.support.git_server import GitHost, git, git_host
from tests.support.repositories import bash, errors, repository_stack, resource, shown
from tests.support.stack import TOOLSET, Stack
from tests.support.waiting import until

pytestmark = [pytest.mark.anyio, pytest.mark.docker]

TOKEN = "ghp_TheTokenOfTheTest"
ROTATED = "ghp_TheOneAfterIt"


# In files, environments and command lines, whatever the uid may read; the words to look for are spelt backwards.
SEARCH = """
for word in {words}; do
    word=$(echo $word | rev)
    grep -rslI -e "$word" / --exclude-dir=proc --exclude-dir=sys | head -5
    grep -rsl -e "$word" /workspace /home /tmp /run | head -5
    for process in /proc/[0-9]*; do
        grep -sl -e "$word" $process/environ $process/cmdline
    done
done 2> /dev/null; echo searched
"""


def search(*tokens: str) -> str:
    """A command that shows where tokens are to be found, as they are or as git sends them."""
    words = [*tokens, *(base64.b64encode(f"x-access-token:{token}".encode()).decode() for token in tokens)]
    return SEARCH.format(words=" ".join(f"'{word[::-1]}'" for word in words))


async def lose(hands: Stack, session: Any) -> None:
    """Have the session's sandbox snapshotted, stopped and destroyed."""
    mine = collector(hands, parked_seconds=0.0)

    async def lost() -> bool:
        await mine.look()
        async with hands.db.transaction() as tx:
            return await bindings.current(tx, session.id) is None

    await until(lost, seconds=90)


@pytest.fixture(scope="module")
def host() -> Iterator[GitHost]:
    with git_host() as made:
        yield made


@pytest.fixture(scope="module")
async def hands(anyio_backend: object, host: GitHost, postgres_url: str, template: str) -> AsyncIterator[Stack]:
    async with repository_stack(host, postgres_url, template) as running:
        yield running


@pytest.mark.requirement("SES-093", "SES-909")
async def test_a_private_repository_is_cloned_pulled_and_pushed_and_the_token_is_nowhere(hands: Stack, host: GitHost) -> None:
    skill = ".claude/skills/tidy/SKILL.md"
    host.repository("acme/private", tokens={TOKEN}, files={"README.md": "acme/private\n", skill: "---\nname: tidy\n---\n"})
    work = """
        cd private && git log --format=%s -1 && cat README.md && git remote get-url origin && git status --short --branch
        git config user.email a@b && git config user.name a && echo new > new.txt && git add . && git commit -qm "from inside"
        git push -q origin main && git pull -q && echo pushed
    """
    session = await hands.session(
        [bash(work), bash(search(TOKEN)), "done"],
        tools=TOOLSET,
        resources=[resource("acme/private", authorization_token=TOKEN)],
    )
    watch = await hands.turn(session)
    assert errors(watch) == []
    worked, searched = shown(watch)
    assert worked.splitlines() == [
        "first",
        "acme/private",
        "https://github.com/acme/private",
        "## main...origin/main",
        "pushed",
    ]
    assert searched == "searched\n"
    assert git("log", "--format=%s", "-1", "main", at=host.root / "acme/private.git") == "from inside"
    assert {token for path, token in host.seen if path.startswith("/acme/private")} == {TOKEN}
    (system,) = {request.system for request in hands.requests(session)}
    assert "/workspace/private (https://github.com/acme/private)" in system
    assert "tidy" not in system
    for event in await hands.history(session):
        assert TOKEN not in event.to_json()


@pytest.mark.requirement("SES-094", "SES-910")
async def test_branches_commits_and_several_repositories(hands: Stack, host: GitHost) -> None:
    host.repository("acme/one", tokens={TOKEN})
    host.repository("acme/two", tokens={ROTATED})
    host.repository("acme/open")
    old = host.head("acme/open")
    # Reachable from no branch, as a pull request's commits are.
    hidden = git("commit-tree", "-p", old, "-m", "hidden", "main^{tree}", at=host.root / "acme/open.git")
    resources = [
        resource("acme/one", authorization_token=TOKEN, checkout={"type": "branch", "name": "feature"}),
        resource("acme/two", authorization_token=ROTATED, checkout={"type": "commit", "sha": host.head("acme/two")}),
        resource("acme/open", mount_path="/home/agent/at/open"),
        resource("acme/open", mount_path="/workspace/hidden", checkout={"type": "commit", "sha": hidden}),
    ]
    look = 'for d in one two ~/at/open hidden; do cd /workspace; cd $d; git log -1 --format="%H %s %d"; git status --short; done'
    session = await hands.session([bash(look), "done"], tools=TOOLSET, resources=resources)
    watch = await hands.turn(session)
    assert errors(watch) == []
    lines = shown(watch)[0].splitlines()
    assert lines[0].startswith(f"{host.head('acme/one', 'feature')} on the branch  (HEAD -> feature, origin/feature")
    assert lines[1].startswith(f"{host.head('acme/two')} first  (HEAD, origin/main")
    assert lines[2].startswith(f"{old} first  (HEAD -> main")
    assert lines[3].startswith(f"{hidden} hidden  (HEAD)")
    assert lines[4:] == []


@pytest.mark.requirement("SES-095")
async def test_what_cannot_be_cloned_is_told_and_the_session_goes_on(hands: Stack, host: GitHost) -> None:
    host.repository("acme/locked", tokens={TOKEN})
    host.repository("acme/forbidden")
    host.repository("acme/broken")
    host.repository("acme/fine")
    host.answers.update({"acme/forbidden": 403, "acme/broken": 500})
    resources = [
        resource("acme/locked", authorization_token="wrong"),
        resource("acme/locked", mount_path="/workspace/without"),
        resource("acme/forbidden"),
        resource("acme/missing", authorization_token=TOKEN),
        resource("acme/fine", mount_path="/workspace/branch", checkout={"type": "branch", "name": "none"}),
        resource("acme/fine", mount_path="/workspace/sha", checkout={"type": "commit", "sha": "0" * 40}),
        resource("acme/broken"),
        resource("acme/fine"),
    ]
    session = await hands.session([bash("cat fine/README.md"), "done", "again"], tools=TOOLSET, resources=resources)
    async with hands.watching(session) as watch:
        await hands.say(session, "go")
        await watch.idle()
        await hands.say(session, "go")
        await watch.idle(2)
    assert shown(watch) == ["acme/fine\n"]
    told = [(error.type, error.repository_url.rpartition("/")[2]) for error in errors(watch)]
    assert told == [
        ("repository_authentication_error", "locked"),
        ("repository_authentication_error", "locked"),
        ("repository_forbidden_error", "forbidden"),
        ("repository_not_found_error", "missing"),
        ("repository_checkout_error", "fine"),
        ("repository_checkout_error", "fine"),
        ("repository_clone_error", "broken"),
    ]
    assert {error.retry_status.type for error in errors(watch)} == {"retrying"}
    assert "required credentials and received none" in errors(watch)[1].message
    assert watch.logged[-1].stop_reason.type == "end_turn"
    assert "wrong" not in "".join(error.message for error in errors(watch))


@pytest.mark.requirement("SES-096")
async def test_a_rotated_token_counts_from_the_next_request_on(hands: Stack, host: GitHost) -> None:
    host.repository("acme/rotated", tokens={TOKEN})
    pull = "git -C rotated pull -q && echo pulled"
    session = await hands.session(
        [bash(pull), "a", bash(f"GIT_TERMINAL_PROMPT=0 {pull}"), "b", bash(pull), "c"],
        tools=TOOLSET,
        resources=[resource("acme/rotated", authorization_token=TOKEN)],
    )
    async with hands.watching(session) as watch:
        await hands.say(session, "go")
        await watch.idle()
        host.tokens["acme/rotated"] = {ROTATED}
        await hands.say(session, "go")
        await watch.idle(2)
        await hands.client.beta.sessions.resources.update(
            session.resources[0].id, session_id=session.id, authorization_token=ROTATED
        )
        await hands.say(session, "go")
        await watch.idle(3)
    first, second, third = shown(watch)
    assert (first, third) == ("pulled\n", "pulled\n")
    assert "pulled" not in second


@pytest.mark.requirement("SES-096")
async def test_a_repository_that_failed_is_cloned_once_its_token_is_rotated(hands: Stack, host: GitHost) -> None:
    host.repository("acme/late", tokens={ROTATED})
    look = bash("cat late/README.md 2> /dev/null || echo none")
    session = await hands.session(
        [look, "a", look, "b", look, "c", look, "d"],
        tools=TOOLSET,
        resources=[resource("acme/late", authorization_token=TOKEN)],
    )

    async def rotate(token: str) -> None:
        await hands.client.beta.sessions.resources.update(
            session.resources[0].id, session_id=session.id, authorization_token=token
        )

    async with hands.watching(session) as watch:
        for turn, token in enumerate((None, "ghp_another_wrong_one", None, ROTATED), start=1):
            if token is not None:
                await rotate(token)
            await hands.say(session, "go")
            await watch.idle(turn)
    # Tried at the start and after each rotation, and told each time.
    assert [error.type for error in errors(watch)] == ["repository_authentication_error"] * 2
    assert shown(watch) == ["none\n"] * 3 + ["acme/late\n"]


@pytest.mark.requirement("SES-097")
async def test_a_token_goes_to_git_requests_of_its_repository_only(hands: Stack, host: GitHost) -> None:
    """In a limited network without exceptions: the repository can be reached, nothing else of its host."""
    host.repository("acme/mine", tokens={TOKEN})
    host.repository("acme/mine2", tokens={TOKEN})
    limited: Any = {"type": "limited"}
    environment = await hands.client.beta.environments.create(name="tight", config={"type": "cloud", "networking": limited})
    tries = """
        export GIT_TERMINAL_PROMPT=0
        git -C mine fetch -q && echo fetched
        git clone -q https://github.com/acme/mine2 2>&1 | tail -1
        for path in /acme/mine /acme/mine/settings /acme/mine2/info/refs /acme/mine/../mine2/info/refs /acme/mine%2f..; do
            curl -s -o /dev/null -w '%{http_code}\n' --path-as-is "https://github.com$path?service=git-upload-pack"
        done
        curl -s -o /dev/null -w '%{http_code}\n' http://github.com/acme/mine/info/refs
        curl -sS https://example.com/ 2>&1 | grep -o 'response 403'
    """
    host.seen.clear()
    agent = await hands.agent([bash(tries), "done"], tools=TOOLSET)
    wanted: list[Any] = [resource("acme/mine", authorization_token=TOKEN)]
    session = await hands.client.beta.sessions.create(agent=agent.id, environment_id=environment.id, resources=wanted)
    watch = await hands.turn(session)
    assert errors(watch) == []
    lines = shown(watch)[0].splitlines()
    assert lines[0] == "fetched"
    assert "403" in lines[1]
    assert lines[2:] == ["403"] * 6 + ["response 403"]
    assert {path.split("/")[2] for path, _ in host.seen} == {"mine"}


@pytest.mark.requirement("SES-098")
async def test_a_lost_sandbox_is_restored_with_its_repositories_as_the_session_left_them(hands: Stack, host: GitHost) -> None:
    host.repository("acme/kept", tokens={TOKEN})
    work, look = "cd kept && git checkout -q -b mine && echo work > work.txt", "git status -sb; ls"
    wanted = [resource("acme/kept", authorization_token=TOKEN)]
    session = await hands.session([bash(work), "a", bash(look), "b"], tools=TOOLSET, resources=wanted)
    async with hands.watching(session) as watch:
        await hands.say(session, "go")
        await watch.idle()
        asked = len(host.seen)
        await lose(hands, session)
        await hands.say(session, "go")
        await watch.idle(2)
    assert errors(watch) == []
    assert shown(watch)[1].splitlines()[-4:] == ["## mine", "?? work.txt", "README.md", "work.txt"]
    assert len(host.seen) == asked
