"""The operator's tools: `keys`, `environment-keys`, `workspaces`, `egress-log`. They talk to the database, not to a server."""

import dataclasses
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import click
import orjson
from pydantic import ValidationError

from managed_agents.cli.flags import CONTEXT_SETTINGS, read_settings, variable
from managed_agents.core import clock
from managed_agents.core.errors import ApiError
from managed_agents.core.limits import RATE_LIMIT_VALUE_MAX
from managed_agents.core.settings import Settings
from managed_agents.db import embedded
from managed_agents.db.engine import Database
from managed_agents.processes.purposes import API_KEYS
from managed_agents.processes.settings import CannotStart, key_provider, organization_limits
from managed_agents.resources.keys import service as key_service
from managed_agents.resources.keys.schemas import UpdateKey
from managed_agents.resources.organizations import service as organizations
from managed_agents.resources.organizations.schemas import UpdateWorkspace
from managed_agents.resources.rate_limits import service as rate_limits
from managed_agents.resources.sessions import egress
from managed_agents.web.actor import RateKind, Reach, Scope

Answer = TypeVar("Answer")
_SCOPES = tuple(scope.name.lower() for scope in Scope)
_STATUSES = ("active", "inactive", "expired", "archived")
_UNITS = {"m": "minutes", "h": "hours", "d": "days"}


class _Duration(click.ParamType[timedelta]):
    """A number and its unit: `90m`, `12h`, `30d`."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> timedelta:
        number, unit = str(value)[:-1], str(value)[-1:]
        if unit not in _UNITS or not number.isascii() or not number.isdigit() or not 0 < int(number) < 100_000:
            self.fail(f"{value!r} is not like 90m, 12h or 30d.", param, ctx)
        return timedelta(**{_UNITS[unit]: int(number)})


_EXPIRES = click.option("--expires-in", type=_Duration(), metavar="30d", help="Useless after that; never when absent. m, h or d.")


@click.group(
    context_settings=CONTEXT_SETTINGS,
    epilog="\b\nExamples:\n  managed-agents keys create --name ci --scope developer\n"
    "  managed-agents keys create --name guest --scope viewer --expires-in 12h\n  managed-agents keys list --status active\n"
    "  managed-agents keys disable apikey_…\n  managed-agents keys revoke apikey_…",
)
def keys() -> None:
    """Create, list, rename, switch off and revoke API keys.

    A key belongs to one workspace. Its scope is viewer (reads), developer (writes too) or admin (manages the workspace's
    keys too; in the default workspace: all workspaces).

    Works on MANAGED_AGENTS_DATABASE_URL, or on the embedded Postgres of MANAGED_AGENTS_DATA_DIR, running or not. Running
    servers heed a change at once.
    """


@keys.command("create")
@click.option("--name", required=True, help="What the key is for.")
@click.option("--workspace", "workspace_id", help="Id of its workspace; the default one when absent.")
@click.option("--scope", type=click.Choice(_SCOPES), default="developer", show_default=True)
@_EXPIRES
def create_key(name: str, workspace_id: str | None, scope: str, expires_in: timedelta | None) -> None:
    """Make a key and print its secret, once."""

    async def create(db: Database, settings: Settings) -> key_service.NewApiKey:
        workspace = workspace_id or (await organizations.default_workspace(db)).id
        return await key_service.create(
            db,
            key_provider(settings).derive(API_KEYS),
            workspace_id=workspace,
            name=name,
            scope=Scope.named(scope),
            expires_at=_later(expires_in),
        )

    _show_secret(_with_database(create))


@keys.command("list")
@click.option("--workspace", "workspace_id", help="Only of this workspace.")
@click.option("--status", type=click.Choice(_STATUSES), help="Only these.")
def list_keys(workspace_id: str | None, status: str | None) -> None:
    """List keys, revoked (archived) ones too, oldest first."""

    async def find(db: Database, _: Settings) -> list[key_service.ApiKey]:
        return await key_service.list_keys(db, workspace_id=workspace_id)

    for key in _with_database(find):
        if status in (None, key.status):
            click.echo(f"{_line(key)}  {key.scope.name.lower():9}  {key.workspace_id}  {key.name}")


@keys.command("rename")
@click.argument("key_id")
@click.argument("name")
def rename_key(key_id: str, name: str) -> None:
    """Give a key another name."""
    click.echo(f"{_change(key_id, name=name).id} is called {name}")


@keys.command("disable")
@click.argument("key_id")
def disable_key(key_id: str) -> None:
    """Switch a key off, until it is enabled."""
    click.echo(f"{key_id} is {_change(key_id, status='inactive').status}")


@keys.command("enable")
@click.argument("key_id")
def enable_key(key_id: str) -> None:
    """Switch a key on again."""
    click.echo(f"{key_id} is {_change(key_id, status='active').status}")


@keys.command("revoke")
@click.argument("key_id")
def revoke_key(key_id: str) -> None:
    """Make a key useless for ever, everywhere at once."""
    click.echo(f"{_with_database(lambda db, _: key_service.revoke(db, key_id)).id} is revoked")


@click.group(
    "environment-keys",
    context_settings=CONTEXT_SETTINGS,
    epilog="\b\nExamples:\n  managed-agents environment-keys create env_… --name worker-1\n"
    "  managed-agents environment-keys list env_…\n  managed-agents environment-keys revoke envkey_…",
)
def environment_keys() -> None:
    """Create, list and revoke environment keys.

    With an environment key a worker serves the sessions of one environment; every other request is refused.
    """


@environment_keys.command("create")
@click.argument("environment_id")
@click.option("--name", required=True, help="What the key is for.")
@_EXPIRES
def create_environment_key(environment_id: str, name: str, expires_in: timedelta | None) -> None:
    """Make an environment key and print its secret, once."""

    async def create(db: Database, settings: Settings) -> key_service.NewApiKey:
        return await key_service.create_for_environment(
            db,
            key_provider(settings).derive(API_KEYS),
            await key_service.workspace_of_environment(db, environment_id),
            environment_id,
            name=name,
            expires_at=_later(expires_in),
        )

    _show_secret(_with_database(create))


@environment_keys.command("list")
@click.argument("environment_id")
def list_environment_keys(environment_id: str) -> None:
    """List an environment's keys, revoked (archived) ones too, oldest first."""

    async def find(db: Database, _: Settings) -> list[key_service.ApiKey]:
        return await key_service.list_keys(db, environment_id=environment_id)

    for key in _with_database(find):
        click.echo(f"{_line(key)}  {key.name}")


@environment_keys.command("revoke")
@click.argument("key_id")
def revoke_environment_key(key_id: str) -> None:
    """Make an environment key useless for ever, everywhere at once."""
    click.echo(f"{_with_database(lambda db, _: key_service.revoke(db, key_id)).id} is revoked")


@click.group(
    context_settings=CONTEXT_SETTINGS,
    epilog="\b\nExamples:\n  managed-agents workspaces create research\n"
    "  managed-agents workspaces limits wrkspc_… --creates 60\n"
    "  managed-agents workspaces limits wrkspc_… --creates none\n"
    "  managed-agents workspaces archive wrkspc_…",
)
def workspaces() -> None:
    """Create, list, rename and archive workspaces, and limit their requests.

    Nothing of one workspace can be seen from another. There are at most 100 that are not archived.
    """


@workspaces.command("create")
@click.argument("name")
def create_workspace(name: str) -> None:
    """Make a workspace and print its id."""
    click.echo(_with_database(lambda db, _: organizations.create_workspace(db, name)).id)


@workspaces.command("list")
@click.option("--all", "everything", is_flag=True, help="Archived ones too.")
def list_workspaces(everything: bool) -> None:
    """List workspaces, oldest first."""
    for workspace in _with_database(lambda db, _: organizations.list_workspaces(db)):
        state = "archived" if workspace.archived_at else "default" if workspace.is_default else ""
        if everything or workspace.archived_at is None:
            click.echo(f"{workspace.id}  {state:8}  {workspace.name}")


@workspaces.command("rename")
@click.argument("workspace_id")
@click.argument("name")
def rename_workspace(workspace_id: str, name: str) -> None:
    """Give a workspace another name."""

    async def rename(db: Database, _: Settings) -> organizations.Workspace:
        return await organizations.update_workspace(db, await _everything(db), workspace_id, UpdateWorkspace(name=name))

    click.echo(f"{_with_database(rename).id} is called {name}")


@workspaces.command("archive")
@click.argument("workspace_id")
def archive_workspace(workspace_id: str) -> None:
    """Archive a workspace for good: all its keys are revoked at once, and nobody can reach what is in it."""

    async def archive(db: Database, _: Settings) -> organizations.Workspace:
        return await organizations.archive(db, await _everything(db), workspace_id)

    click.echo(f"{_with_database(archive).id} is archived")


@workspaces.command("limits")
@click.argument("workspace_id")
@click.option("--creates", help="Create requests a minute; `none` for the organisation's limit alone.")
@click.option("--reads", help="Read requests a minute; `none` for the organisation's limit alone.")
def limit_workspace(workspace_id: str, creates: str | None, reads: str | None) -> None:
    """Show a workspace's own rate limits, or set them. The organisation's limit holds beside them."""
    wanted = {kind: _limit(value) for kind, value in ((RateKind.CREATE, creates), (RateKind.READ, reads)) if value is not None}

    async def change(db: Database, settings: Settings) -> tuple[dict[RateKind, int], Settings]:
        await rate_limits.override(db, await _everything(db), workspace_id, wanted)
        return await rate_limits.overrides_of(db, workspace_id), settings

    own, settings = _with_database(change)
    for kind in RateKind:
        of_all = organization_limits(settings)[kind]
        click.echo(f"{kind.value:7} {own.get(kind, 'none'):>9}   (organisation: {of_all} a minute)")


@click.command(
    "egress-log",
    context_settings=CONTEXT_SETTINGS,
    epilog="\b\nExamples:\n  managed-agents egress-log sesn_…\n  managed-agents egress-log sesn_… --limit 20 --json",
)
@click.argument("session_id")
@click.option(
    "--limit", type=click.IntRange(1, egress.KEPT_ENTRIES), default=100, show_default=True, help="At most so many, the newest."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def egress_log(session_id: str, limit: int, as_json: bool) -> None:
    """Show what the sandboxes of a session asked the network for, the oldest first.

    One line a request or tunnel that has ended: when, what became of it, how, to where, bytes sent and received, seconds.
    The newest thousand of a session are kept. Paths and headers are not.
    """
    for access in _with_database(lambda db, _: egress.accesses(db, session_id, limit=limit)):
        if as_json:
            click.echo(orjson.dumps(dataclasses.asdict(access), option=orjson.OPT_UTC_Z))
        else:
            at, place = f"{access.at:%Y-%m-%d %H:%M:%S}", f"{access.host}:{access.port}"
            moved = f"{access.bytes_sent:>10} {access.bytes_received:>12} {access.seconds:>9.3f}"
            click.echo(f"{at}  {access.outcome:15}  {access.protocol:7}  {moved}  {place}")


def _limit(value: str) -> int | None:
    if value == "none":
        return None
    if not value.isascii() or not value.isdigit() or int(value) > RATE_LIMIT_VALUE_MAX:
        raise click.UsageError(f"{value!r} is neither a number of requests nor `none`.")
    return int(value)


def _later(expires_in: timedelta | None) -> datetime | None:
    return None if expires_in is None else clock.now() + expires_in


def _line(key: key_service.ApiKey) -> str:
    end = f"until {key.expires_at:%Y-%m-%d %H:%M}" if key.expires_at else ""
    used = f"used {key.last_used_at:%Y-%m-%d}" if key.last_used_at else "unused"
    return f"{key.id}  …{key.hint}  {key.status:8}  {used:15}  {end:22}"


def _show_secret(made: key_service.NewApiKey) -> None:
    key = made.key
    what = f"for {key.environment_id}" if key.environment_id else f"in {key.workspace_id}, scope {key.scope.name.lower()}"
    click.echo(f"{key.id} {what}. The secret is shown only now:", err=True)
    click.echo(made.secret.get_secret_value())


def _change(key_id: str, **fields: Any) -> key_service.ApiKey:
    async def change(db: Database, _: Settings) -> key_service.ApiKey:
        return await key_service.update_key(db, await _everything(db), key_id, UpdateKey.model_validate(fields))

    return _with_database(change)


async def _everything(db: Database) -> Reach:
    """An operator may administer all there is."""
    return Reach((await organizations.default_workspace(db)).organization_id, None)


def _with_database(use: Callable[[Database, Settings], Awaitable[Answer]]) -> Answer:
    """Open the database that the settings name, call `use`, and turn its refusals into messages."""
    import anyio

    settings = read_settings({})

    async def run(database_url: str) -> Answer:
        db = Database(database_url, pool=1, application_name="managed-agents keys")
        try:
            return await use(db, settings)
        except ApiError as error:
            raise click.ClickException(error.message) from None
        except CannotStart as error:
            raise click.ClickException(str(error)) from None
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            raise click.ClickException(f"{first['loc'][0]}: {first['msg']}") from None
        finally:
            await db.dispose()

    if settings.database_url is not None:
        return anyio.run(run, settings.database_url.get_secret_value())
    if not _has_data(settings.data_dir):
        raise click.UsageError(
            f"there is no database in {settings.data_dir} yet: run `managed-agents up` once, or set "
            f"{variable('data_dir')} or {variable('database_url')}."
        )
    with embedded.start_blocking(settings.data_dir) as server:
        return anyio.run(run, server.url)


def _has_data(data_dir: Path) -> bool:
    return (data_dir / "postgres" / "data").exists()
