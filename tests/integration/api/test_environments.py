"""Environments through the SDK."""

from typing import Any

import anthropic
import pytest
from anthropic import AsyncAnthropic
from sqlalchemy import text

from managed_agents.core.errors import InvalidRequest, NotFound
from managed_agents.resources.environments.service import usable_for_session

from .conftest import Served

pytestmark = pytest.mark.anyio

EMPTY = {"type": "packages", "apt": [], "cargo": [], "gem": [], "go": [], "npm": [], "pip": []}
CLOUD = {"type": "cloud", "networking": {"type": "unrestricted"}, "packages": EMPTY}


@pytest.mark.requirement("ENV-001", "ENV-020", "ENV-032")
async def test_a_name_is_enough(client: AsyncAnthropic) -> None:
    made = await client.beta.environments.create(name="e")
    shown = made.to_dict()
    assert shown["config"] == CLOUD
    assert (shown["description"], shown["metadata"], shown["scope"]) == (None, {}, "organization")
    assert await client.beta.environments.retrieve(made.id) == made


@pytest.mark.requirement("ENV-022", "ENV-023", "ENV-024", "ENV-026")
async def test_updates_merge(client: AsyncAnthropic) -> None:
    made = await client.beta.environments.create(
        name="e",
        description="d",
        metadata={"a": "1", "b": "2", "c": "3"},
        config={"type": "cloud", "networking": {"type": "unrestricted"}, "packages": {"pip": []}},
    )
    kept = await client.beta.environments.update(made.id, name=None, config={"type": "cloud"})
    assert (kept.name, kept.description, kept.config) == ("e", "d", made.config)
    patched = await client.beta.environments.update(made.id, name="f", description="", metadata={"a": "", "b": None, "d": "4"})
    assert (patched.name, patched.description, patched.metadata) == ("f", "", {"c": "3", "d": "4"})
    cleared = await client.beta.environments.update(made.id, description=None)
    assert cleared.description is None


@pytest.mark.requirement("CNV-036", "ENV-021")
async def test_a_taken_name_is_a_conflict_until_archived(client: AsyncAnthropic) -> None:
    first = await client.beta.environments.create(name="e")
    other = await client.beta.environments.create(name="f")
    with pytest.raises(anthropic.ConflictError) as refused:
        await client.beta.environments.create(name="e")
    assert refused.value.response.headers["x-should-retry"] == "false"
    with pytest.raises(anthropic.ConflictError):
        await client.beta.environments.update(other.id, name="e")
    await client.beta.environments.archive(first.id)
    assert (await client.beta.environments.create(name="e")).id != first.id


@pytest.mark.requirement("CNV-044", "ENV-027")
async def test_archiving_is_final(client: AsyncAnthropic) -> None:
    made = await client.beta.environments.create(name="e")
    archived = await client.beta.environments.archive(made.id)
    assert archived.archived_at is not None
    assert await client.beta.environments.archive(made.id) == archived
    with pytest.raises(anthropic.BadRequestError) as refused:
        await client.beta.environments.update(made.id, name="x")
    assert refused.value.body["error"]["details"] == {"error_code": "environment_archived"}  # pyright: ignore
    assert [shown.id async for shown in client.beta.environments.list()] == []
    assert [shown.id async for shown in client.beta.environments.list(include_archived=True)] == [made.id]


@pytest.mark.requirement("CNV-053", "ENV-028")
async def test_deleting(client: AsyncAnthropic) -> None:
    made = await client.beta.environments.create(name="e")
    deleted = await client.beta.environments.delete(made.id)
    assert deleted.to_dict() == {"id": made.id, "type": "environment_deleted"}
    with pytest.raises(anthropic.NotFoundError) as missing:
        await client.beta.environments.delete(made.id)
    assert missing.value.body["error"]["details"] == {"error_code": "environment_not_found"}  # pyright: ignore


@pytest.mark.requirement("ENV-029")
async def test_an_environment_in_use_is_not_deleted(client: AsyncAnthropic, served: Served) -> None:
    made = await client.beta.environments.create(name="e")
    async with served.services.db.transaction() as tx:
        await tx.execute(text("CREATE TABLE uses (environment_id text REFERENCES environments (id))"))
        await tx.execute(text("INSERT INTO uses VALUES (:id)"), {"id": made.id})
    with pytest.raises(anthropic.ConflictError, match="in use"):
        await client.beta.environments.delete(made.id)
    assert await client.beta.environments.retrieve(made.id) == made


@pytest.mark.requirement("ENV-031")
async def test_lists_page_newest_first(client: AsyncAnthropic) -> None:
    made = [await client.beta.environments.create(name=f"e{index}") for index in range(5)]
    assert [shown async for shown in client.beta.environments.list(limit=2)] == made[::-1]


@pytest.mark.requirement("CNV-055")
async def test_another_workspace_sees_nothing(client: AsyncAnthropic, stranger: AsyncAnthropic) -> None:
    made = await client.beta.environments.create(name="e")
    await stranger.beta.environments.create(name="e")
    texts: set[str] = set()
    for environment_id in (made.id, "env_011CZkZAtmR3yMPDzynEDxu7", "agent_1"):
        for call in (
            stranger.beta.environments.retrieve,
            lambda id_: stranger.beta.environments.update(id_, name="g"),
            stranger.beta.environments.archive,
            stranger.beta.environments.delete,
        ):
            with pytest.raises(anthropic.NotFoundError) as missing:
                await call(environment_id)
            texts.add(missing.value.body["error"]["message"])  # pyright: ignore
    assert texts == {"Environment not found."}
    assert await client.beta.environments.retrieve(made.id) == made


LIMITED: dict[str, Any] = {"type": "limited"}
REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("config.type: ", {"config": {"type": "self_hosted"}}),
    ("scope: ", {"scope": "account"}),
]


@pytest.mark.requirement("ENV-903", "ENV-905")
@pytest.mark.parametrize(("path", "fields"), REFUSED)
async def test_what_is_not_served_is_refused_by_name(client: AsyncAnthropic, path: str, fields: dict[str, Any]) -> None:
    made = await client.beta.environments.create(name="e")
    with pytest.raises(anthropic.BadRequestError) as refused:
        await client.beta.environments.create(**{"name": "f", **fields})
    assert refused.value.body["error"]["message"].startswith(path)  # pyright: ignore
    with pytest.raises(anthropic.BadRequestError) as refused:
        await client.beta.environments.update(made.id, **fields)
    assert refused.value.body["error"]["message"].startswith(path)  # pyright: ignore
    assert [shown async for shown in client.beta.environments.list()] == [made]


@pytest.mark.requirement("ENV-039")
async def test_limited_with_exceptions(client: AsyncAnthropic) -> None:
    wanted: Any = {"type": "limited", "allow_mcp_servers": True, "allowed_hosts": ["example.com", "*.example.org"]}
    made = await client.beta.environments.create(name="e", config={"type": "cloud", "networking": wanted})
    shown = {**wanted, "allow_package_managers": False}
    assert made.to_dict()["config"] == {**CLOUD, "networking": shown}
    more: Any = {"type": "limited", "allow_package_managers": True, "allowed_hosts": ["example.net"]}
    changed = await client.beta.environments.update(made.id, config={"type": "cloud", "networking": more})
    assert changed.to_dict()["config"] == {**CLOUD, "networking": {**shown, **more}}


@pytest.mark.requirement("ENV-039")
async def test_limited_without_exceptions(client: AsyncAnthropic) -> None:
    shown = {"type": "limited", "allow_mcp_servers": False, "allow_package_managers": False, "allowed_hosts": []}
    made = await client.beta.environments.create(name="e", config={"type": "cloud", "networking": {"type": "limited"}})
    assert made.to_dict()["config"] == {**CLOUD, "networking": shown}
    null: Any = {"type": "limited", "allow_mcp_servers": None, "allow_package_managers": None, "allowed_hosts": None}
    for same in ({"type": "cloud"}, {"type": "cloud", "networking": None}, {"type": "cloud", "networking": null}):
        kept = await client.beta.environments.update(made.id, config=same)  # pyright: ignore
        assert kept.config == made.config
    opened = await client.beta.environments.update(made.id, config={"type": "cloud", "networking": {"type": "unrestricted"}})
    assert opened.to_dict()["config"] == CLOUD


@pytest.mark.requirement("ENV-042")
async def test_the_type_of_a_config_is_for_life(client: AsyncAnthropic) -> None:
    made = await client.beta.environments.create(name="e")
    with pytest.raises(anthropic.BadRequestError) as refused:
        await client.beta.environments.update(made.id, config={"type": "self_hosted"})
    assert refused.value.body["error"]["details"] == {"error_code": "invalid_config_type_change"}  # pyright: ignore


@pytest.mark.requirement("ENV-025")
async def test_metadata_limits_have_their_own_code(client: AsyncAnthropic) -> None:
    too_many = {str(index): "x" for index in range(17)}
    for bad in (too_many, {"k" * 65: "x"}, {"k": "x" * 513}, {"": "x"}):
        with pytest.raises(anthropic.BadRequestError) as refused:
            await client.beta.environments.create(name="f", metadata=bad)
        assert refused.value.body["error"]["details"] == {"error_code": "invalid_metadata"}  # pyright: ignore


@pytest.mark.requirement("ENV-030")
async def test_a_session_may_use_a_live_environment_of_its_workspace(client: AsyncAnthropic, served: Served) -> None:
    made = await client.beta.environments.create(name="e")
    mine, theirs = served.caller.workspace_id, served.stranger.workspace_id
    async with served.services.db.transaction() as tx:
        assert (await usable_for_session(tx, mine, made.id)).id == made.id
        with pytest.raises(NotFound, match="environment_id: "):
            await usable_for_session(tx, theirs, made.id)
    await client.beta.environments.archive(made.id)
    async with served.services.db.transaction() as tx:
        with pytest.raises(InvalidRequest, match=r"environment_id: .* archived"):
            await usable_for_session(tx, mine, made.id)


@pytest.mark.requirement("ENV-907")
async def test_texts_are_bounded(client: AsyncAnthropic) -> None:
    made = await client.beta.environments.create(name="n" * 256, description="d" * 2048)
    assert (len(made.name), len(made.description or "")) == (256, 2048)
    for field, bad in (("name", {"name": "n" * 257}), ("description", {"name": "x", "description": "d" * 2049})):
        with pytest.raises(anthropic.BadRequestError, match=field):
            await client.beta.environments.create(**bad)
    with pytest.raises(anthropic.BadRequestError, match="name"):
        await client.beta.environments.update(made.id, name="")
