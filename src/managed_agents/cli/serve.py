"""Commands that run processes: `up`, `api`, `worker`, `egress`, `migrate`."""

import os
from collections.abc import Awaitable, Callable
from typing import Any

import click

from managed_agents.cli.flags import CONTEXT_SETTINGS, read_settings, setting_flags, variable
from managed_agents.core.settings import Settings
from managed_agents.processes import parent


def _named(subject: str) -> tuple[str, ...]:
    """All settings of a subject, so that a new one is a flag at once."""
    return tuple(name for name in Settings.model_fields if name == subject or name.startswith(f"{subject}_"))


_DATABASE = ("database_url", "db_pool")
_PLACES = ("data_dir", "run_dir", "blob_store", "master_key_file")
_API = (
    "host",
    "port",
    "require_beta_header",
    "rate_limits",
    "rate_limit_creates_per_minute",
    "rate_limit_reads_per_minute",
    "connections",
    "streams",
    "body_memory_bytes",
)
_WORKER = (
    "metrics_port",
    "harnesses",
    "worker_turns",
    "drain_seconds",
    "lease_ttl_seconds",
    "model_base_url",
    "model_api_key",
    *_named("sandbox"),
    "host_name",
    *_named("packages"),
    *_named("repository"),
    *_named("web"),
    "local_sandbox_unsafe",
    "extra_ca",
    "egress",
)
_EGRESS = tuple(name for name in _named("egress") if name != "egress")


@click.command(
    context_settings=CONTEXT_SETTINGS,
    epilog="\b\nExamples:\n  managed-agents up\n  ANTHROPIC_API_KEY=sk-… managed-agents up --port 9000\n"
    "  managed-agents up --database-url postgresql://user@db.internal/agents",
)
@setting_flags([*_API, *_PLACES, *_DATABASE, "api_key", "script", *_WORKER, *_EGRESS, "log_level"])
def up(**flags: Any) -> None:
    """Everything on this machine, under one supervisor.

    Starts embedded Postgres when no database URL is given, brings the database up to date, starts the scripted model
    when no model is configured, then an API and a worker process. Prints base URL and key when ready.
    """
    from managed_agents.processes.up import replace_this_process

    settings = read_settings(flags)
    os.environ[variable("data_dir")] = str(settings.data_dir)
    os.environ[variable("host")] = settings.host
    os.environ[variable("port")] = str(settings.port)
    replace_this_process()


@click.command(context_settings=CONTEXT_SETTINGS)
@setting_flags([*_API, *_PLACES, *_DATABASE, "log_level"])
def api(**flags: Any) -> None:
    """One API process; any number of them share a database."""
    settings = _with_database(flags)
    from managed_agents.processes import api as process  # seconds of imports: a mistake is told before

    _run("api", process.run, settings)


@click.command(context_settings=CONTEXT_SETTINGS)
@setting_flags([*_WORKER, *_EGRESS, *_PLACES, *_DATABASE, "log_level"])
def worker(**flags: Any) -> None:
    """One worker process: runs agents and their sandboxes; any number of them share a database."""
    settings = _with_database(flags)
    from managed_agents.processes import worker as process  # seconds of imports: a mistake is told before

    _run("worker", process.run, settings)


@click.command(context_settings=CONTEXT_SETTINGS)
@setting_flags([*_EGRESS, "sandbox_image", "data_dir", "run_dir", *_DATABASE, "log_level"])
def egress(**flags: Any) -> None:
    """The network of this host's sandboxes as a process of its own; its workers then run with `--egress off`."""
    settings = _with_database(flags)
    from managed_agents.processes import egress as process  # seconds of imports: a mistake is told before

    _run("egress", process.run, settings)


@click.command(context_settings=CONTEXT_SETTINGS)
@setting_flags(["database_url", "data_dir", "master_key_file", "api_key", "log_level"])
def migrate(**flags: Any) -> None:
    """Bring the database to this version; make the master key, and the first API key when one is given.

    Repeating is safe, and so is running it from several machines at once.
    """
    settings = _with_database(flags)
    from managed_agents.processes import prepare as process  # seconds of imports: a mistake is told before

    _run("migrate", process.run, settings)


def _with_database(flags: dict[str, Any]) -> Settings:
    settings = read_settings(flags)
    if settings.database_url is None:
        raise click.UsageError(
            "which database? Set MANAGED_AGENTS_DATABASE_URL or --database-url. (`managed-agents up` brings its own.)"
        )
    return settings


class _CannotStart(click.ClickException):
    """Says why, and by its status that trying again is of no use."""

    exit_code = parent.CANNOT_START_STATUS


def _run(role: str, main: Callable[[Settings], Awaitable[None]], settings: Settings) -> None:
    import anyio

    from managed_agents.core import faults, logs
    from managed_agents.processes.settings import CannotStart

    logs.configure(role, settings.log_level)
    faults.arm_from(settings.faults)
    try:
        anyio.run(main, settings, backend_options={"use_uvloop": True})
    except CannotStart as error:
        raise _CannotStart(str(error)) from None
