"""The worker process: harness, hands, and the reconcilers of this host."""

import contextlib
import functools
import importlib
import logging
import os
import random
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Protocol

import anyio
from sqlalchemy.exc import SQLAlchemyError

from managed_agents.core import addresses
from managed_agents.core.logs import Trouble
from managed_agents.core.settings import Settings
from managed_agents.db.engine import Database
from managed_agents.db.listener import Doorbell
from managed_agents.eventlog.batch import Appender
from managed_agents.eventlog.hints import Hints
from managed_agents.eventlog.previews import PreviewSender
from managed_agents.eventlog.subscribe import Hub
from managed_agents.harness.brain import STANDARD, Harness, StandardHarness
from managed_agents.harness.hands import Hands
from managed_agents.harness.loop import Parts
from managed_agents.harness.request import ModelRequester
from managed_agents.harness.tools.guarded_http import GuardedClient
from managed_agents.harness.tools.model_search import ModelSearch
from managed_agents.harness.tools.web import WebTools
from managed_agents.harness.tools.web_fetch import WebFetch
from managed_agents.harness.tools.web_search import Brave, SearchProvider, Searxng
from managed_agents.harness.worker import Worker
from managed_agents.model.client import AnthropicModelClient, ModelClient
from managed_agents.model.endpoint import Endpoint, resolve_endpoint
from managed_agents.model.models import Models
from managed_agents.processes import egress
from managed_agents.processes.lifetime import serving, until_signalled
from managed_agents.processes.sandboxes import sandbox_plan
from managed_agents.processes.settings import CannotStart, blob_store
from managed_agents.reconcilers.blob_collector import BlobCollector
from managed_agents.reconcilers.idempotency_eraser import erase_expired
from managed_agents.reconcilers.sandbox_collector import SandboxCollector
from managed_agents.reconcilers.sandbox_pool import SandboxPool
from managed_agents.reconcilers.session_eraser import erase_deleted
from managed_agents.resources.files.service import referenced as files_referenced
from managed_agents.resources.sessions import clones, snapshots
from managed_agents.sandbox.backend import SandboxBackend, SandboxError
from managed_agents.sandbox.docker import DockerBackend, installation_of
from managed_agents.sandbox.local import LocalBackend
from managed_agents.sandbox.packages import InstallSettings

logger = logging.getLogger(__name__)

SANDBOX_LOOK_SECONDS = 10.0
PLACE_LOOK_SECONDS = 1.0
ERASE_LOOK_SECONDS = 2.0
BLOB_LOOK_SECONDS = 600.0
IDEMPOTENCY_LOOK_SECONDS = 300.0
LOOK_SECONDS_MAX = 300.0
TIDY_SECONDS_MAX = 8.0


class Until(Protocol):
    """Says when `work` ends; see `lifetime.until_signalled`."""

    async def __call__(
        self, work: Callable[[], Awaitable[None]], drain: Callable[[], Awaitable[None]], *, drain_seconds: float
    ) -> None: ...


async def run(settings: Settings, *, until: Until = until_signalled) -> None:
    """Work until a signal arrives; sessions at hand are handed over to the others.

    `until`: what ends it instead, where the process is not the worker's own.

    Raises:
        CannotStart: no model, or a backend that these settings forbid.
    """
    assert settings.database_url is not None, "the command line checked it"
    database_url = settings.database_url.get_secret_value()
    try:
        endpoint = resolve_endpoint(settings, os.environ)
    except ValueError as error:
        raise CannotStart(f"MANAGED_AGENTS_{error}") from None
    if endpoint is None:
        raise CannotStart(
            "which model? Set ANTHROPIC_API_KEY, or MANAGED_AGENTS_MODEL_BASE_URL. (`managed-agents up` starts a "
            "scripted model when neither is set.)"
        )
    backend = sandbox_backend(settings, endpoint)
    plan = sandbox_plan(settings)
    host = settings.effective_host_name
    db = Database(database_url, pool=settings.db_pool, application_name="managed-agents worker")
    blobs = blob_store(settings)
    doorbell = Doorbell(database_url)
    appender = Appender(db, Hints(Hub(db), doorbell).appended)
    client = AnthropicModelClient(endpoint)
    previews = PreviewSender(database_url)
    parts = Parts(
        db=db,
        appender=appender,
        requester=ModelRequester(client, Models(client.anthropic)),
        hands=Hands(
            db,
            backend,
            blobs,
            plan.spec,
            host,
            settings.sandbox_image,
            settings.sandbox_snapshot_seconds,
            settings.sandbox_running_max,
            settings.sandbox_wait_seconds,
            settings.repository_cache_bytes,
        ),
        harnesses=harnesses_of(settings),
        previews=previews,
        web=web_tools(settings, client),
        jitter=random.random,
    )
    worker = Worker(parts, turns_max=settings.worker_turns, ttl_seconds=settings.lease_ttl_seconds)
    collector = SandboxCollector(
        db,
        backend,
        blobs,
        host=host,
        pause_seconds=settings.sandbox_pause_seconds,
        idle_seconds=settings.sandbox_idle_seconds,
        parked_seconds=settings.sandbox_parked_seconds,
    )
    pool = SandboxPool(
        db,
        backend,
        plan.spec,
        plan.pools,
        host=host,
        image=settings.sandbox_image,
        running_max=settings.sandbox_running_max,
    )
    blob_collector = BlobCollector(db, blobs, [files_referenced, snapshots.referenced, clones.referenced])

    async def work() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(doorbell.run)
            group.start_soon(previews.run)
            await group.start(appender.run)
            group.start_soon(_forever, "sandbox collector", collector.look, SANDBOX_LOOK_SECONDS)
            group.start_soon(_forever, "sandbox pauses", collector.pause_resting, SANDBOX_LOOK_SECONDS)
            group.start_soon(_forever, "sandbox pool", pool.look, PLACE_LOOK_SECONDS)
            for environment_id in plan.pools:
                prepare = functools.partial(pool.prepare, environment_id)
                bound = settings.packages_seconds + LOOK_SECONDS_MAX
                group.start_soon(_forever, "packages of a sandbox pool", prepare, PLACE_LOOK_SECONDS, bound)
            if settings.sandbox_running_max:
                group.start_soon(_forever, "sandbox places", collector.relieve, PLACE_LOOK_SECONDS)
            group.start_soon(_forever, "session eraser", lambda: erase_deleted(db), ERASE_LOOK_SECONDS)
            group.start_soon(_forever, "idempotency eraser", lambda: erase_expired(db), IDEMPOTENCY_LOOK_SECONDS)
            group.start_soon(_forever, "blob collector", blob_collector.look, BLOB_LOOK_SECONDS)
            if settings.egress == "on" and settings.sandbox == "docker":
                group.start_soon(egress.serve, settings, db)
            async with serving_operations(settings, db):
                await worker.run()

    async def work_and_tidy() -> None:
        try:
            await work()
        finally:
            with anyio.move_on_after(TIDY_SECONDS_MAX, shield=True):
                try:
                    await collector.stop_resting()
                    await pool.drain()
                except (SQLAlchemyError, SandboxError, OSError) as error:
                    logger.warning("resting sandboxes not stopped: %s: %s", type(error).__name__, error)

    try:
        await until(work_and_tidy, lambda: worker.drain(seconds=settings.drain_seconds), drain_seconds=settings.drain_seconds)
    finally:
        await client.aclose()
        await backend.aclose()
        await db.dispose()


@contextlib.asynccontextmanager
async def serving_operations(settings: Settings, db: Database) -> AsyncGenerator[None]:
    """Serve /healthz, /readyz and /metrics where a port for them is set."""
    if settings.metrics_port is None:
        yield
        return
    # The web framework costs half a second and 20 MB: only a worker that serves loads it.
    from managed_agents.api.health import operations_app

    async with serving(operations_app(db), host=settings.host, port=settings.metrics_port, connections_max=settings.connections):
        yield


def harnesses_of(settings: Settings) -> dict[str, Harness]:
    """The standard harness, and those that the settings name.

    Raises:
        CannotStart: one of them cannot be loaded.
    """
    harnesses: dict[str, Harness] = {STANDARD: StandardHarness()}
    for item in filter(None, (item.strip() for item in settings.harnesses.split(","))):
        name, _, place = item.partition("=")
        module, _, attribute = place.partition(":")
        if not (name and module and attribute):
            raise CannotStart(f"MANAGED_AGENTS_HARNESSES: {item!r} is not name=module:object")
        try:
            harnesses[name] = getattr(importlib.import_module(module), attribute)()
        except (ImportError, AttributeError, TypeError) as error:
            raise CannotStart(f"MANAGED_AGENTS_HARNESSES: {item!r} cannot be loaded: {error}") from error
    return harnesses


def sandbox_backend(settings: Settings, endpoint: Endpoint) -> SandboxBackend:
    """The backend that the settings choose.

    Raises:
        CannotStart: `local` isolates nothing, so only a model on this machine may drive it unless told otherwise.
    """
    if settings.sandbox == "docker":
        return DockerBackend(
            installation=installation_of(settings.data_dir),
            uid_base=settings.sandbox_uid_base,
            runtime=settings.sandbox_runtime,
            data_dir=settings.data_dir,
            run_dir=settings.effective_run_dir,
            installs=InstallSettings(
                settings.packages_network,
                install_environment(settings),
                settings.extra_ca,
                settings.packages_seconds,
                settings.sandbox_cpus,
                settings.packages_disk_bytes,
                settings.packages_images_bytes,
            ),
        )
    if not endpoint.is_loopback and not settings.local_sandbox_unsafe:
        raise CannotStart(
            "the `local` sandbox isolates nothing, and the model is not on this machine. Use MANAGED_AGENTS_SANDBOX="
            "docker, or set MANAGED_AGENTS_LOCAL_SANDBOX_UNSAFE=true if commands of the model may run here unprotected."
        )
    return LocalBackend(data_dir=settings.data_dir, run_dir=settings.effective_run_dir, uid_base=settings.sandbox_uid_base)


def install_environment(settings: Settings) -> dict[str, str]:
    """The variables that installs of packages get.

    Raises:
        CannotStart: one of them is not NAME=value.
    """
    pairs = [item.partition("=") for item in settings.packages_environment.split()]
    for name, equals, _ in pairs:
        if not (equals and name.isidentifier()):
            raise CannotStart(f"MANAGED_AGENTS_PACKAGES_ENVIRONMENT: {name[:100]!r} is not NAME=value")
    return {name: value for name, _, value in pairs}


def web_tools(settings: Settings, client: ModelClient) -> WebTools:
    """The web tools of the settings.

    Raises:
        CannotStart: the search provider takes a key, and there is none.
    """
    guarded = GuardedClient(exceptions=addresses.networks(settings.web_allowed_networks))
    return WebTools(WebFetch(guarded), _search_provider(settings, client), follow_networking=settings.web_networking == "on")


def _search_provider(settings: Settings, client: ModelClient) -> SearchProvider | None:
    if settings.web_search is None:
        return None
    kind, _, url = settings.web_search.partition("+")
    if kind == "messages-api":
        return ModelSearch(client)
    if kind == "searxng":
        return Searxng(url.rstrip("/"))
    if settings.web_search_api_key is None:
        raise CannotStart("MANAGED_AGENTS_WEB_SEARCH=brave needs MANAGED_AGENTS_WEB_SEARCH_API_KEY")
    return Brave(settings.web_search_api_key, url.rstrip("/")) if url else Brave(settings.web_search_api_key)


async def _forever(
    name: str, look: Callable[[], Awaitable[object]], every_seconds: float, seconds_max: float = LOOK_SECONDS_MAX
) -> None:
    """Supervise one reconciler: a failed look is logged and tried again."""
    trouble = Trouble(logger)
    while True:
        try:
            with anyio.fail_after(seconds_max):
                await look()
            trouble.over("%s works again", name)
        except (SQLAlchemyError, SandboxError, OSError, TimeoutError) as error:
            trouble.report("%s failed: %s: %s", name, type(error).__name__, error)
        await anyio.sleep(every_seconds)
