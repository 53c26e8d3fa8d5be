"""`web_fetch`: one page, as text or as a PDF document, for the model to read.

What goes wrong is told to the model under the Messages API's own codes. Repeating a call is harmless, so it is not journalled: a
new owner of the session fetches again.
"""

import base64
import functools
import logging
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import anyio.to_thread
import orjson

from managed_agents.eventlog.events import SpanUsage
from managed_agents.harness.tools import domains, pages
from managed_agents.harness.tools.guarded_http import (
    URL_CHARS_MAX,
    BodyTooLarge,
    CodingUnknown,
    GuardedClient,
    NotAllowed,
    NotReachable,
    Page,
)
from managed_agents.harness.tools.seen_urls import normalised

logger = logging.getLogger(__name__)
Json = dict[str, Any]

TEXT_BYTES_MAX = 2 * 1024 * 1024  # of a page that becomes text; what follows is left out
PDF_BYTES_MAX = 20 * 1024 * 1024  # as `read`
CHARS_PER_TOKEN = 4
CONVERSION_SECONDS_MAX = 30.0
CONVERSIONS_AT_ONCE = 2
_NEEDED = ("LD_LIBRARY_PATH", "LANG", "LC_ALL", "TZ")  # where interpreter and library are, and what the system is set to

SeenUrls = Callable[[Json], Awaitable[set[str]]]
"""URLs of the conversation for a `url_sources` configuration."""


class WebError(Exception):
    """What the model is told: a code of the Messages API and a sentence. `usage` is what the failing has cost."""

    def __init__(self, code: str, message: str, usage: SpanUsage | None = None) -> None:
        super().__init__(f"{code}: {message}")
        self.usage = usage


class WebFetch:
    """The tool, for all sessions of a worker."""

    def __init__(self, client: GuardedClient) -> None:
        self._client = client
        self._conversions = anyio.CapacityLimiter(CONVERSIONS_AT_ONCE)

    async def run(self, arguments: Json, config: Json, seen: SeenUrls) -> list[Json]:
        """Fetch; returns content blocks.

        Raises WebError.
        """
        url = arguments.get("url")
        if not isinstance(url, str) or not url.strip():
            raise WebError("invalid_tool_input", "url is required and must be a string")
        url = url.strip()
        if len(url) > URL_CHARS_MAX:
            raise WebError("url_too_long", f"at most {URL_CHARS_MAX} characters")
        sources = config.get("url_sources")
        if sources is not None and normalised(url) not in await seen(sources):
            raise WebError("url_not_in_prior_context", "only URLs that appeared in this conversation can be fetched")
        page = await self._get(url, config)
        if page.status == 429:
            raise WebError("too_many_requests", "the server answered 429")
        if page.status >= 400:
            raise WebError("url_not_accessible", f"the server answered {page.status}")
        return await self._content(page, config.get("max_content_tokens"))

    async def _get(self, url: str, config: Json) -> Page:
        try:
            return await self._client.get(url, permitted=lambda address: domains.permitted(address, config), bytes_max=_bytes_max)
        except NotAllowed as error:
            raise WebError("url_not_allowed", str(error)) from error
        except NotReachable as error:
            raise WebError("url_not_accessible", str(error)) from error
        except BodyTooLarge as error:
            raise WebError("content_too_large", str(error)) from error
        except CodingUnknown as error:
            raise WebError("unsupported_content_type", f"content-encoding {error}") from error

    async def _content(self, page: Page, tokens_max: int | None) -> list[Json]:
        kind = pages.kind_of(page.content_type, page.body)
        if kind == "pdf":
            return _document(page)
        if kind == "other":
            raise WebError("unsupported_content_type", f"{page.content_type[:100]} is neither text nor PDF")
        title, text = await self._text(page, is_html=kind == "html")
        notes = [f"[Only the first {TEXT_BYTES_MAX} bytes of the page were read.]"] if page.cut else []
        if tokens_max is not None and len(text) > tokens_max * CHARS_PER_TOKEN:
            text = text[: tokens_max * CHARS_PER_TOKEN]
            notes.append(f"[Cut at about {tokens_max} tokens, the limit of this tool.]")
        head = [f"URL: {page.url}", *([f"Title: {title}"] if title else [])]
        return [{"type": "text", "text": "\n".join(head) + "\n\n" + "\n\n".join([text or "(no text on this page)", *notes])}]

    async def _text(self, page: Page, *, is_html: bool) -> tuple[str | None, str]:
        if not is_html:
            # In a thread: what a stranger wrote may take its decoder seconds.
            decode = functools.partial(pages.decoded, page.body, page.charset, is_html=False)
            return None, await anyio.to_thread.run_sync(decode, abandon_on_cancel=True)
        command = [sys.executable, "-I", "-m", pages.__name__, page.url, page.charset or ""]

        try:
            async with self._conversions:
                with anyio.fail_after(CONVERSION_SECONDS_MAX):
                    done = await anyio.run_process(command, input=page.body, stderr=subprocess.DEVNULL, env=_environment())
        except (OSError, TimeoutError, subprocess.CalledProcessError) as error:
            logger.warning("a page cannot be turned into text: %s", type(error).__name__)
            raise WebError("unavailable", "the page cannot be turned into text") from error
        title, text = orjson.loads(done.stdout)
        return title, text


def _environment() -> dict[str, str]:
    """Of the conversion: native code that reads what strangers wrote is not handed this process's keys and passwords."""
    return {name: os.environ[name] for name in _NEEDED if name in os.environ}


def _bytes_max(content_type: str) -> tuple[int, bool]:
    return (PDF_BYTES_MAX, True) if content_type == "application/pdf" else (TEXT_BYTES_MAX, False)


def _document(page: Page) -> list[Json]:
    if page.cut:
        raise WebError("content_too_large", f"the PDF is larger than {TEXT_BYTES_MAX} bytes")
    if not page.body.startswith(b"%PDF-"):
        # The model API would refuse such a document, and with it every later request of the session.
        raise WebError("unsupported_content_type", "the answer says that it is a PDF, and is none")
    data = base64.b64encode(page.body).decode()
    return [{"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": data}}]
