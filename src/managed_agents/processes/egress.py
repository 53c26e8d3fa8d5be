"""The egress gateway of a host: inside a worker, or a process of its own (`managed-agents egress`).

Whoever holds the lock in the run directory serves; the others wait, and take over within a second of its death.
"""

import functools
import logging
import re
import ssl
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import certifi
from anyio.lowlevel import checkpoint

from managed_agents.core import addresses
from managed_agents.core.settings import Settings
from managed_agents.db.engine import Database
from managed_agents.egress import tls
from managed_agents.egress.access_log import AccessLog
from managed_agents.egress.connect import Connector
from managed_agents.egress.gateway import Bounds, Gateway
from managed_agents.egress.policy import CachedPolicies
from managed_agents.egress.substitution import Source, Sources
from managed_agents.egress.visit import Credentials
from managed_agents.encryption.sealing import Sealer
from managed_agents.processes.lifetime import raise_open_files, until_signalled
from managed_agents.processes.purposes import SECRETS
from managed_agents.processes.settings import CannotStart, key_provider
from managed_agents.resources.sessions import repository_tokens
from managed_agents.resources.sessions.egress import StoredPolicies
from managed_agents.resources.sessions.repository_tokens import RepositoryTokens
from managed_agents.sandbox import layout
from managed_agents.sandbox.backend import SandboxError
from managed_agents.sandbox.docker import installation_of
from managed_agents.sandbox.package_hosts import PackageHosts

if TYPE_CHECKING:
    from managed_agents.egress.authority import Authority

logger = logging.getLogger(__name__)

RESTART_SECONDS = 1.0
AUTHORITY_SECONDS_MAX = 60.0
_ROUTE = re.compile(r"([A-Za-z0-9._-]+):([0-9]{1,5})=([A-Za-z0-9._-]+):([0-9]{1,5})")
_CERTIFICATE = re.compile("-----BEGIN CERTIFICATE-----[A-Za-z0-9+/=\\s]+-----END CERTIFICATE-----")


async def run(settings: Settings) -> None:
    """Serve the sandboxes of this host until a signal arrives."""
    assert settings.database_url is not None, "the command line checked it"
    db = Database(settings.database_url.get_secret_value(), pool=settings.db_pool, application_name="managed-agents egress")
    try:
        await until_signalled(functools.partial(serve, settings, db), checkpoint)
    finally:
        await db.dispose()


def credential_sources(settings: Settings, db: Database) -> Mapping[str, Source]:
    """What knows the credentials of sessions, by the name its bindings carry (`egress/substitution.py`)."""
    sealing = Sealer(key_provider(settings), SECRETS)
    return {repository_tokens.SOURCE: RepositoryTokens(db, sealing)}


async def serve(settings: Settings, db: Database) -> None:
    """Serve until cancelled, or wait while another process does.

    Raises:
        CannotStart: EXTRA_CA cannot be read.
    """
    hosts = PackageHosts(settings.sandbox_image, installation=installation_of(settings.data_dir))
    named = [host.strip() for host in settings.egress_package_hosts.split(",") if host.strip()]

    async def package_hosts() -> Iterable[str]:
        try:
            return [*named, *await hosts.hosts()]
        except SandboxError as error:
            logger.warning("hosts of the package managers are not known: %s", error)
            return named

    sources = Sources(credential_sources(settings, db))
    usual = _authorities(settings)
    credentials = Credentials(
        sources,
        functools.cache(functools.partial(_authority, settings)),
        functools.cache(functools.partial(tls.trusted_context, usual)),
    )
    stored = StoredPolicies(db, package_hosts, sources.bindings)
    log = AccessLog(stored)
    gateway = Gateway(
        settings.effective_run_dir,
        CachedPolicies(stored),
        log,
        connector=Connector(addresses.networks(settings.egress_allowed_networks), routes=routes_of(settings)),
        credentials=credentials,
        bounds=_bounds(settings),
    )
    while True:
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(log.run)
                await group.start(gateway.run)
        except* OSError as errors:
            logger.error("egress gateway failed: %s", errors.exceptions[0])
        await anyio.sleep(RESTART_SECONDS)


def _bounds(settings: Settings) -> Bounds:
    wanted, open_files = Bounds(connections=settings.egress_connections, bytes=settings.egress_bytes), raise_open_files()
    bounds = wanted.within(open_files)
    if bounds != wanted and bounds.connections_in_all < 4 * wanted.connections:
        logger.warning(
            "this process may open %d files: the sandboxes of this host get %d network connections at once",
            open_files,
            bounds.connections_at_most,
        )
    return bounds


def routes_of(settings: Settings) -> dict[tuple[str, int], tuple[str, int]]:
    """Where connections to some hosts really go.

    Raises:
        CannotStart: it is not host:port=host:port.
    """
    routes: dict[tuple[str, int], tuple[str, int]] = {}
    for item in filter(None, (item.strip() for item in settings.egress_routes.split(","))):
        found = _ROUTE.fullmatch(item)
        if found is None:
            raise CannotStart(f"MANAGED_AGENTS_EGRESS_ROUTES: {item[:200]!r} is not host:port=host:port")
        routes[found[1].lower(), int(found[2])] = (found[3], int(found[4]))
    return routes


def ca_bundle(settings: Settings) -> Path:
    """The authorities that sandboxes trust: the usual ones, those of EXTRA_CA, and this host's own (made when there is none).

    Raises:
        CannotStart: EXTRA_CA cannot be read or holds no certificate, or this host's authority cannot be read or made.
    """
    bundle, usual = settings.data_dir / "ca-bundle.pem", _authorities(settings)
    certificate = settings.data_dir / tls.AUTHORITY_DIRECTORY / tls.AUTHORITY_CERTIFICATE
    try:
        if bundle.read_text() == usual + certificate.read_text():
            return bundle
    except OSError:
        pass  # the child makes it, or says what is wrong
    command = [sys.executable, "-m", "managed_agents.egress.authority"]
    command += [str(settings.data_dir), str(bundle), str(layout.java_bundle(bundle))]
    try:
        made = subprocess.run(command, input=usual, capture_output=True, text=True, timeout=AUTHORITY_SECONDS_MAX, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotStart(f"certificate authority of the egress gateway: {error}") from None
    if made.returncode != 0:
        raise CannotStart(f"certificate authority of the egress gateway: {made.stderr.strip()[-500:]}")
    return bundle


def _authority(settings: Settings) -> "Authority":
    """Raises: AuthorityUnreadable."""
    from managed_agents.egress import authority  # weighs megabytes, and many never need it

    return authority.load(settings.data_dir)


def _authorities(settings: Settings) -> str:
    """Whom this installation trusts: this machine's authorities, or a well-known list where it has none, and EXTRA_CA.

    Raises: CannotStart.
    """
    found = _CERTIFICATE.findall(Path(ssl.get_default_verify_paths().cafile or certifi.where()).read_text(errors="replace"))
    if settings.extra_ca is not None:
        try:
            extra = _CERTIFICATE.findall(settings.extra_ca.read_text())
            ssl.create_default_context(cadata="\n".join(extra))
        except (OSError, ValueError, ssl.SSLError) as error:
            raise CannotStart(f"MANAGED_AGENTS_EXTRA_CA={settings.extra_ca}: {error}") from None
        if not extra:
            raise CannotStart(f"MANAGED_AGENTS_EXTRA_CA={settings.extra_ca}: there is no certificate in it")
        found += extra
    return "".join(f"{one}\n" for one in found)
