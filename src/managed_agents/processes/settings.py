"""Parts that several processes build from the settings in the same way."""

from pathlib import Path
from urllib.parse import unquote, urlsplit

from managed_agents.blobstore.local import LocalBlobStore
from managed_agents.blobstore.store import BlobStore
from managed_agents.core.settings import Settings
from managed_agents.encryption.keyring import LocalKeyProvider, MasterKeyUnreadable
from managed_agents.web.actor import RateKind


class CannotStart(Exception):
    """A process cannot start with these settings; the message says what to do.

    It ends with `parent.CANNOT_START_STATUS`, so that a supervisor does not try again what cannot go better.
    """


def blob_store(settings: Settings) -> BlobStore:
    """The blob store of the settings.

    Raises:
        CannotStart: a kind that is not served yet.
    """
    url = urlsplit(settings.effective_blob_store)
    if url.scheme != "file" or url.netloc:
        raise CannotStart(f"MANAGED_AGENTS_BLOB_STORE={settings.effective_blob_store}: only file:///absolute/path is served yet")
    return LocalBlobStore(Path(unquote(url.path)))


def organization_limits(settings: Settings) -> dict[RateKind, int]:
    """Requests a minute of the whole organisation."""
    return {
        RateKind.CREATE: settings.rate_limit_creates_per_minute,
        RateKind.READ: settings.rate_limit_reads_per_minute,
    }


def key_provider(settings: Settings) -> LocalKeyProvider:
    """The keys of this installation; makes the master key when there is none.

    Raises:
        CannotStart: the file is not one of ours, or may not be read.
    """
    try:
        return LocalKeyProvider(settings.effective_master_key_file)
    except MasterKeyUnreadable as error:
        raise CannotStart(f"{error}. Restore it from the backup: a new one would make every API key useless.") from None
