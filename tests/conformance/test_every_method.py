"""Every method of the SDK's agents, environments, sessions and files: used, or refused as not served. Both clients, strict.

The SDK checks each answer against its types. A method that a new release brings fails the last test until it is in a list.
"""

import inspect
from collections.abc import AsyncIterator, Iterator
from operator import attrgetter
from typing import Any

import anthropic
import anyio
import anyio.to_thread
import httpx2
import pytest
from anthropic import Anthropic

from managed_agents.scripted_model import text, tool_use
from tests.support.stack import BETA, MODEL, TOOLSET, Stack, message
from tests.support.watch import WAIT_SECONDS

pytestmark = pytest.mark.anyio

NOUNS = ("agents", "environments", "sessions", "files")

# What answers 404, with arguments that the SDK takes.
NOT_SERVED: dict[str, dict[str, Any]] = {
    "environments.work.ack": {"work_id": "work_01x", "environment_id": "env_01x"},
    "environments.work.heartbeat": {"work_id": "work_01x", "environment_id": "env_01x"},
    "environments.work.list": {"environment_id": "env_01x"},
    "environments.work.poll": {"environment_id": "env_01x"},
    "environments.work.retrieve": {"work_id": "work_01x", "environment_id": "env_01x"},
    "environments.work.stats": {"environment_id": "env_01x"},
    "environments.work.stop": {"work_id": "work_01x", "environment_id": "env_01x"},
    "environments.work.update": {"work_id": "work_01x", "environment_id": "env_01x", "metadata": {}},
}
# Programs of the asynchronous client around methods that are listed: work of self-hosted environments, and the runner of
# custom tools, which test_custom_tools.py uses.
PROGRAMS = {"environments.work.poller", "environments.work.worker", "sessions.events.tool_runner"}


def methods(resource: Any, path: str) -> Iterator[str]:
    """Dotted names of everything that a resource of the SDK can be asked."""
    for name in dir(type(resource)):
        if name.startswith(("_", "with_")):
            continue
        if callable(inspect.getattr_static(type(resource), name)):
            yield f"{path}.{name}"
        else:
            yield from methods(getattr(resource, name), f"{path}.{name}")


class Driver:
    """One of the two clients, asked by the names of methods, so that one story serves both."""

    def __init__(self, client: Any) -> None:
        self.beta = client.beta
        self.used: set[str] = set()
        self._blocking = isinstance(client, Anthropic)

    async def __call__(self, method: str, *arguments: Any, **named: Any) -> Any:
        """Ask, and return the parsed answer: an object, a page or a stream."""
        self.used.add(method)
        bound = attrgetter(method)(self.beta)
        if self._blocking:
            return await anyio.to_thread.run_sync(lambda: bound(*arguments, **named))
        return await bound(*arguments, **named)

    async def read_turn(self, stream: Any) -> list[str]:
        """Read a stream up to the idle status."""
        kinds: list[str] = []
        with anyio.fail_after(WAIT_SECONDS):
            while "session.status_idle" not in kinds:
                event = await (anyio.to_thread.run_sync(next, stream) if self._blocking else anext(aiter(stream)))
                kinds.append(event.type)
        return kinds

    async def close(self, stream: Any) -> None:
        """Leave a stream."""
        closing = stream.close()
        if inspect.isawaitable(closing):
            await closing


@pytest.fixture(params=["sync", "async"])
async def driver(request: pytest.FixtureRequest, server: Stack) -> AsyncIterator[Driver]:
    """The client of the tests, or its blocking twin with the same strictness."""
    if request.param == "async":
        yield Driver(server.client)
        return
    client = Anthropic(
        base_url=server.base_url,
        api_key=server.caller.secret,
        max_retries=0,
        _strict_response_validation=True,
        http_client=httpx2.Client(timeout=30.0, trust_env=False, verify=False),
    )
    with client:
        yield Driver(client)


@pytest.mark.requirement("CNV-003", "CNV-020", "CNV-024", "CNV-053", "ENV-035", "OBS-032")
async def test_every_served_method(server: Stack, driver: Driver) -> None:
    await _agents(driver)
    await _environments(driver)
    file = await _files(driver)
    await _sessions(server, driver, file)
    every = {name for noun in NOUNS for name in methods(getattr(driver.beta, noun), noun)}
    assert driver.used | set(NOT_SERVED) == every - PROGRAMS
    assert driver.used & set(NOT_SERVED) == set()


async def _agents(ask: Driver) -> None:
    agent = await ask("agents.create", name="every", model=MODEL, tools=TOOLSET, metadata={"a": "1"}, description="d")
    assert (await ask("agents.retrieve", agent.id)).to_dict() == agent.to_dict()
    updated = await ask("agents.update", agent.id, version=1, name="every method")
    assert (await ask("agents.retrieve", agent.id, version=1)).name == "every"
    assert [each.version for each in (await ask("agents.versions.list", agent.id, limit=5)).data] == [2, 1]
    listed = await ask("agents.list", limit=1, include_archived=True, created_at_gte=agent.created_at)
    assert listed.data[0].id == updated.id
    assert (await ask("agents.archive", agent.id)).archived_at is not None


async def _environments(ask: Driver) -> None:
    environment = await ask("environments.create", name=f"every {id(ask)}", config={"type": "cloud"}, metadata={"a": "1"})
    assert (await ask("environments.retrieve", environment.id)).to_dict() == environment.to_dict()
    updated = await ask("environments.update", environment.id, description="d")
    assert updated.description == "d"
    assert (await ask("environments.list", limit=1, include_archived=True)).data[0].id == environment.id
    assert (await ask("environments.archive", environment.id)).archived_at is not None
    assert (await ask("environments.delete", environment.id)).type == "environment_deleted"


async def _files(ask: Driver) -> Any:
    file = await ask("files.upload", file=("every.txt", b"every", "text/plain"))
    assert (await ask("files.retrieve_metadata", file.id)).filename == "every.txt"
    assert file.id in [each.id for each in (await ask("files.list", limit=20)).data]
    with pytest.raises(anthropic.BadRequestError, match="is not downloadable"):
        await ask("files.download", file.id)
    unused = await ask("files.upload", file=("unused.txt", b"", "text/plain"))
    assert (await ask("files.delete", unused.id)).id == unused.id
    return file


async def _sessions(server: Stack, ask: Driver, file: Any) -> None:
    replies = [[tool_use("bash", command="cp /mnt/session/uploads/in.txt /mnt/session/outputs/")], [text("done")]]
    agent = await server.agent(replies, tools=TOOLSET)
    session = await ask(
        "sessions.create",
        agent={"type": "agent", "id": agent.id, "version": 1},
        environment_id=server.environment_id,
        title="every",
        metadata={"a": "1"},
        resources=[{"type": "file", "file_id": file.id, "mount_path": "/in.txt"}],
    )
    stream = await ask("sessions.events.stream", session.id)
    sent = await ask("sessions.events.send", session.id, events=[message("go")])
    kinds = await ask.read_turn(stream)
    await ask.close(stream)
    assert kinds[-3:] == ["session.thread_status_idle", "session.usage", "session.status_idle"]
    history = await ask("sessions.events.list", session.id, limit=1000, order="asc", types=["user.message"])
    assert [event.id for event in history.data] == [event.id for event in sent.data]
    (thread,) = (await ask("sessions.threads.list", session.id, statuses=["idle"])).data
    assert (await ask("sessions.threads.retrieve", thread.id, session_id=session.id)).parent_thread_id is None
    of_thread = await ask("sessions.threads.events.list", thread.id, session_id=session.id, limit=3)
    assert [event.type for event in of_thread.data][2] == "user.message"
    following = await ask("sessions.threads.events.stream", thread.id, session_id=session.id)
    await ask.close(following)
    with pytest.raises(anthropic.BadRequestError, match="primary thread"):
        await ask("sessions.threads.archive", thread.id, session_id=session.id)
    await _resources(ask, session, file)
    made = await ask("files.list", scope_id=session.id, betas=[BETA])
    (output,) = [each for each in made.data if each.downloadable]
    content = await ask("files.download", output.id)
    read = content.read()
    assert (await read if inspect.isawaitable(read) else read) == b"every"
    assert (await ask("sessions.update", session.id, title="changed", metadata={"a": None})).title == "changed"
    listed = await ask("sessions.list", agent_id=agent.id, agent_version=1, statuses=["idle"], order="asc", limit=3)
    assert [each.id for each in listed.data] == [session.id]
    assert (await ask("sessions.retrieve", session.id)).to_dict()["metadata"] == {}
    assert (await ask("sessions.archive", session.id)).status == "terminated"
    assert (await ask("sessions.delete", session.id)).type == "session_deleted"


async def _resources(ask: Driver, session: Any, file: Any) -> None:
    added = await ask("sessions.resources.add", session.id, type="file", file_id=file.id, mount_path="/added.txt")
    shown = await ask("sessions.resources.retrieve", added.id, session_id=session.id)
    assert shown.to_dict() == added.to_dict()
    assert len((await ask("sessions.resources.list", session.id, limit=10)).data) == 2
    with pytest.raises(anthropic.BadRequestError, match="token rotation"):
        await ask("sessions.resources.update", added.id, session_id=session.id, authorization_token="x")
    assert (await ask("sessions.resources.delete", added.id, session_id=session.id)).type == "session_resource_deleted"


@pytest.mark.parametrize("method", sorted(NOT_SERVED))
async def test_every_other_method_is_refused(driver: Driver, method: str) -> None:
    with pytest.raises(anthropic.NotFoundError) as refused:
        await driver(method, **NOT_SERVED[method])
    assert refused.value.body["error"]["message"] == "not found"  # pyright: ignore
