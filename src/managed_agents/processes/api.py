"""The api process: the HTTP edge, and the fan-out to its own streams."""

import functools

import anyio

from managed_agents.api.app import create_app
from managed_agents.core.settings import Settings
from managed_agents.db.engine import Database
from managed_agents.db.listener import KEYS_CHANNEL, LOG_CHANNEL, Doorbell, listen
from managed_agents.encryption.sealing import Sealer
from managed_agents.eventlog import interest
from managed_agents.eventlog.hints import Hints
from managed_agents.eventlog.previews import PREVIEW_CHANNEL
from managed_agents.eventlog.subscribe import Hub
from managed_agents.processes.lifetime import serving, until_signalled
from managed_agents.processes.purposes import API_KEYS, SECRETS
from managed_agents.processes.settings import blob_store, key_provider, organization_limits
from managed_agents.resources.keys.service import KeyDirectory
from managed_agents.resources.rate_limits.limiter import Limiter
from managed_agents.resources.services import Services
from managed_agents.resources.sessions.events_service import SessionEvents
from managed_agents.resources.sessions.service import Sessions
from managed_agents.web.state import Capacity


async def run(settings: Settings) -> None:
    """Serve until a signal arrives. Streams are ended first, then requests finish."""
    assert settings.database_url is not None, "the command line checked it"
    database_url = settings.database_url.get_secret_value()
    db = Database(database_url, pool=settings.db_pool, application_name="managed-agents api")
    hub, doorbell = Hub(db), Doorbell(database_url)
    hints = Hints(hub, doorbell)
    provider = key_provider(settings)
    keys = KeyDirectory(db, provider.derive(API_KEYS))
    limits = organization_limits(settings)
    limiter = Limiter(db, limits) if settings.rate_limits == "on" else None
    services = Services(
        db=db,
        keys=keys,
        blobs=blob_store(settings),
        sessions=Sessions(
            db,
            hints,
            Sealer(provider, SECRETS),
            web_search=settings.web_search is not None,
            web_networking=settings.web_networking == "on",
        ),
        events=SessionEvents(db, hints, hub),
        require_beta_header=settings.require_beta_header,
        web_search=settings.web_search is not None,
        rate_limits=limiter,
        organization_limits=limits,
        capacity=Capacity(body_bytes_max=settings.body_memory_bytes, streams_max=settings.streams),
    )

    async def missed() -> None:
        keys.forget()
        await hub.refresh_all()

    # What this process appends itself, streams have from it at once.
    listeners = {LOG_CHANNEL: hub.refresh, KEYS_CHANNEL: keys.forget}
    hear = functools.partial(listen, database_url, listeners, missed, beside=doorbell)

    async def work() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(hub.run)
            group.start_soon(doorbell.run)
            if limiter is not None:
                group.start_soon(limiter.run)
            group.start_soon(hear)
            group.start_soon(listen, database_url, {PREVIEW_CHANNEL: hub.publish_previews})
            group.start_soon(interest.keep, db, hub.previewed)
            async with serving(
                create_app(services), host=settings.host, port=settings.port, connections_max=settings.connections
            ):
                await anyio.sleep_forever()

    async def end_streams() -> None:
        hub.close()

    try:
        await until_signalled(work, end_streams)
    finally:
        await db.dispose()
