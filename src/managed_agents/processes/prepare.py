"""Before anything serves: the schema at this version, the master key, and the first API key where one is given."""

from managed_agents.core.settings import Settings
from managed_agents.db import migrate
from managed_agents.db.connection import TROUBLE, connect
from managed_agents.db.engine import Database
from managed_agents.processes.purposes import API_KEYS
from managed_agents.processes.settings import CannotStart, key_provider
from managed_agents.resources.keys import service as keys


async def run(settings: Settings) -> None:
    """Repeating is safe, also from several processes at once.

    Raises:
        CannotStart: the database cannot be used.
    """
    assert settings.database_url is not None, "the command line checked it"
    database_url = settings.database_url.get_secret_value()
    try:
        (await connect(database_url)).terminate()
    except TROUBLE as error:
        raise CannotStart(f"the database of MANAGED_AGENTS_DATABASE_URL cannot be used: {error}") from None
    await migrate.upgrade(database_url)
    provider = key_provider(settings)
    if settings.api_key is None:
        return
    db = Database(database_url, pool=1, application_name="managed-agents migrate")
    try:
        await keys.bootstrap(db, provider.derive(API_KEYS), settings.api_key)
    finally:
        await db.dispose()
