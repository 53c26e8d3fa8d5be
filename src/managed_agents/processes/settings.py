"""Parts that several processes build from the settings in the same way."""

from pathlib import Path
from urllib.parse import unquote, urlsplit

from managed_agents.blobstore.local import LocalBlobStore
from managed_agents.blobstore.store import BlobStore
from managed_agents.core.settings import Settings


class CannotStart(Exception):
    """A process cannot start with these settings; the message says what to do."""


def blob_store(settings: Settings) -> BlobStore:
    """The blob store of the settings.

    Raises:
        CannotStart: a kind that is not served yet.
    """
    url = urlsplit(settings.effective_blob_store)
    if url.scheme != "file" or url.netloc:
        raise CannotStart(f"MANAGED_AGENTS_BLOB_STORE={settings.effective_blob_store}: only file:///absolute/path is served yet")
    return LocalBlobStore(Path(unquote(url.path)))
