"""The egress gateway of a host: inside a worker, or a process of its own (`managed-agents egress`).

Whoever holds the lock in the run directory serves; the others wait, and take over within a second of its death.
"""

import functools
import logging
import ssl
from collections.abc import Iterable
from pathlib import Path

import anyio
from anyio.lowlevel import checkpoint

from managed_agents.core import addresses
from managed_agents.core.settings import Settings
from managed_agents.db.engine import Database
from managed_agents.egress.access_log import AccessLog
from managed_agents.egress.connect import Connector
from managed_agents.egress.gateway import Bounds, Gateway
from managed_agents.egress.policy import CachedPolicies
from managed_agents.processes.lifetime import until_signalled
from managed_agents.processes.settings import CannotStart
from managed_agents.resources.sessions.egress import StoredPolicies
from managed_agents.sandbox.backend import SandboxError
from managed_agents.sandbox.package_hosts import PackageHosts

logger = logging.getLogger(__name__)

RESTART_SECONDS = 1.0


async def run(settings: Settings) -> None:
    """Serve the sandboxes of this host until a signal arrives."""
    assert settings.database_url is not None, "the command line checked it"
    db = Database(settings.database_url.get_secret_value(), pool=settings.db_pool, application_name="managed-agents egress")
    try:
        await until_signalled(functools.partial(serve, settings, db), checkpoint)
    finally:
        await db.dispose()


async def serve(settings: Settings, db: Database) -> None:
    """Serve until cancelled, or wait while another process does."""
    hosts = PackageHosts(settings.sandbox_image)
    named = [host.strip() for host in settings.egress_package_hosts.split(",") if host.strip()]

    async def package_hosts() -> Iterable[str]:
        try:
            return [*named, *await hosts.hosts()]
        except SandboxError as error:
            logger.warning("hosts of the package managers are not known: %s", error)
            return named

    stored = StoredPolicies(db, package_hosts)
    log = AccessLog(stored)
    gateway = Gateway(
        settings.effective_run_dir,
        CachedPolicies(stored),
        log,
        connector=Connector(addresses.networks(settings.egress_allowed_networks)),
        bounds=Bounds(connections=settings.egress_connections, bytes=settings.egress_bytes),
    )
    while True:
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(log.run)
                await group.start(gateway.run)
        except* OSError as errors:
            logger.error("egress gateway failed: %s", errors.exceptions[0])
        await anyio.sleep(RESTART_SECONDS)


def ca_bundle(settings: Settings) -> Path | None:
    """The authorities that sandboxes trust: this machine's and those of EXTRA_CA. None without EXTRA_CA.

    Raises:
        CannotStart: EXTRA_CA cannot be read, or holds no certificate.
    """
    if settings.extra_ca is None:
        return None
    try:
        extra = settings.extra_ca.read_text()
        ssl.create_default_context(cadata=extra)
    except (OSError, ValueError, ssl.SSLError) as error:
        raise CannotStart(f"MANAGED_AGENTS_EXTRA_CA={settings.extra_ca}: {error}") from None
    ours = Path(ssl.get_default_verify_paths().cafile or "")
    usual = ours.read_text() if ours.is_file() else ""
    bundle = settings.data_dir / "ca-bundle.pem"
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    draft = bundle.with_suffix(".new")
    draft.write_text(f"{usual.rstrip()}\n{extra.rstrip()}\n")
    draft.chmod(0o644)
    draft.rename(bundle)
    return bundle
