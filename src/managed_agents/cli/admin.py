"""The operator's tools: `keys` and `workspaces`. They talk to the database, not to a server."""

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import click

from managed_agents.cli.flags import CONTEXT_SETTINGS, read_settings, variable
from managed_agents.core.errors import ApiError
from managed_agents.core.settings import Settings
from managed_agents.db import embedded
from managed_agents.db.engine import Database
from managed_agents.encryption.keyring import LocalKeyProvider
from managed_agents.processes.purposes import API_KEYS
from managed_agents.resources.keys import service as key_service
from managed_agents.resources.organizations import service as organizations
from managed_agents.web.actor import Scope

Answer = TypeVar("Answer")
_SCOPES = tuple(scope.name.lower() for scope in Scope)


@click.group(
    context_settings=CONTEXT_SETTINGS,
    epilog="\b\nExamples:\n  managed-agents keys create --name ci --scope developer\n  managed-agents keys list\n"
    "  managed-agents keys revoke apikey_…",
)
def keys() -> None:
    """Create, list and revoke API keys.

    Works on MANAGED_AGENTS_DATABASE_URL, or on the embedded Postgres of MANAGED_AGENTS_DATA_DIR, running or not.
    """


@keys.command("create")
@click.option("--name", required=True, help="What the key is for.")
@click.option("--workspace", "workspace_id", help="Id of its workspace; the oldest one when absent.")
@click.option("--scope", type=click.Choice(_SCOPES), default="developer", show_default=True)
def create_key(name: str, workspace_id: str | None, scope: str) -> None:
    """Make a key and print its secret, once."""

    async def create(db: Database, settings: Settings) -> key_service.NewApiKey:
        provider = LocalKeyProvider(settings.effective_master_key_file)
        workspace = workspace_id or (await organizations.default_workspace(db)).id
        return await key_service.create(
            db, provider.derive(API_KEYS), workspace_id=workspace, name=name, scope=Scope.named(scope)
        )

    made = _with_database(create)
    click.echo(f"{made.key.id} in {made.key.workspace_id}, scope {scope}. The secret is shown only now:", err=True)
    click.echo(made.secret.get_secret_value())


@keys.command("list")
@click.option("--workspace", "workspace_id", help="Only of this workspace.")
def list_keys(workspace_id: str | None) -> None:
    """List keys, revoked ones too, oldest first."""

    async def find(db: Database, _: Settings) -> list[key_service.ApiKey]:
        return await key_service.list_keys(db, workspace_id=workspace_id)

    for key in _with_database(find):
        state = f"revoked {key.revoked_at:%Y-%m-%d}" if key.revoked_at else "live"
        scope = key.scope.name.lower()
        click.echo(f"{key.id}  …{key.hint}  {scope:10} {key.workspace_id}  {state:18} {key.name}")


@keys.command("revoke")
@click.argument("key_id")
def revoke_key(key_id: str) -> None:
    """Make a key useless, everywhere within a few seconds."""

    async def revoke(db: Database, _: Settings) -> key_service.ApiKey:
        return await key_service.revoke(db, key_id)

    click.echo(f"{_with_database(revoke).id} is revoked")


@click.group(context_settings=CONTEXT_SETTINGS)
def workspaces() -> None:
    """Create and list workspaces. Nothing of one workspace can be seen from another."""


@workspaces.command("create")
@click.argument("name")
def create_workspace(name: str) -> None:
    """Make a workspace and print its id."""

    async def create(db: Database, _: Settings) -> organizations.Workspace:
        return await organizations.create_workspace(db, name)

    click.echo(_with_database(create).id)


@workspaces.command("list")
def list_workspaces() -> None:
    """List workspaces, oldest first."""

    async def find(db: Database, _: Settings) -> list[organizations.Workspace]:
        return await organizations.list_workspaces(db)

    for workspace in _with_database(find):
        click.echo(f"{workspace.id}  {workspace.name}")


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
