"""Requests to addresses that the model names, made by the harness itself, which stands inside the operator's network.

Every address is checked when the connection is made to it, and that very address is connected to: between check and connection
nothing is resolved again, so a name that changes its mind (DNS rebinding) gains nothing. Redirects are followed here, each as a
new request. Names, bodies, times, compression and redirects are bounded. No proxy, cookie or credential of ours goes along.
"""

import ssl
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import anyio
import httpcore
import httpx

from managed_agents.core import addresses

CONNECT_SECONDS = 10.0
FETCH_SECONDS_MAX = 30.0
REDIRECTS_MAX = 5
URL_CHARS_MAX = 2048
ADDRESSES_TRIED_MAX = 4
REDIRECTS = frozenset({301, 302, 303, 307, 308})
USER_AGENT = "Mozilla/5.0 (compatible; managed-agents/0.1; web_fetch)"

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]


class NotAllowed(Exception):
    """The request would go where it must not."""


class NotReachable(Exception):
    """Nothing usable came back."""


class BodyTooLarge(Exception):
    """The body is larger than what was asked for."""


class CodingUnknown(Exception):
    """The body is compressed in a way that was not asked for."""


async def resolve(host: str, port: int) -> Sequence[str]:
    """Addresses of `host`, as the system resolves them."""
    found = await anyio.getaddrinfo(host, port, type=1)  # SOCK_STREAM
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


class GuardedBackend(httpcore.AsyncNetworkBackend):
    """Connects to allowed addresses only."""

    def __init__(self, exceptions: Iterable[addresses.Network], resolver: Resolve) -> None:
        self._exceptions = tuple(exceptions)
        self._resolve = resolver
        self._backend = cast(httpcore.AsyncNetworkBackend, httpcore.AnyIOBackend())

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        try:
            with anyio.fail_after(timeout):
                found = await self._resolve(host, port)
        except (OSError, UnicodeError, TimeoutError) as error:
            raise httpcore.ConnectError(f"the name {host} cannot be resolved") from error
        allowed = [address for address in found if addresses.allowed(address, self._exceptions)]
        if not allowed:
            raise NotAllowed(f"{host} is not a public address")
        for address in allowed[: ADDRESSES_TRIED_MAX - 1]:
            try:
                return await self._backend.connect_tcp(address, port, timeout, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                continue
        return await self._backend.connect_tcp(allowed[-1], port, timeout, local_address, socket_options)

    async def connect_unix_socket(
        self, path: str, timeout: float | None = None, socket_options: Iterable[Any] | None = None
    ) -> httpcore.AsyncNetworkStream:
        raise NotAllowed("unix sockets are not public")

    async def sleep(self, seconds: float) -> None:
        await anyio.sleep(seconds)


@dataclass(frozen=True, slots=True)
class Page:
    """What came back. `cut`: the body went on beyond what was asked for."""

    url: str
    status: int
    content_type: str
    charset: str | None
    body: bytes
    cut: bool


class GuardedClient:
    """GET, for URLs that somebody else chose."""

    def __init__(
        self, *, exceptions: Iterable[addresses.Network] = (), resolver: Resolve = resolve, tls: ssl.SSLContext | None = None
    ) -> None:
        self._backend = GuardedBackend(exceptions, resolver)
        self._tls = tls or httpx.create_ssl_context(trust_env=False)

    async def get(self, url: str, *, permitted: Callable[[str], bool], bytes_max: Callable[[str], tuple[int, bool]]) -> Page:
        """Fetch `url`, following redirects; `permitted` is asked before each request.

        `bytes_max` says for a content type how much of a body is taken, and whether more is an error.

        Raises:
            NotAllowed, NotReachable, BodyTooLarge, CodingUnknown.
        """
        try:
            with anyio.fail_after(FETCH_SECONDS_MAX):
                for _ in range(REDIRECTS_MAX + 1):
                    check_url(url)
                    if not permitted(url):
                        raise NotAllowed(f"{httpx.URL(url).host} is outside the domains of this tool")
                    page = await self._once(url, bytes_max)
                    if isinstance(page, Page):
                        return page
                    url = page
        except TimeoutError as error:
            raise NotReachable(f"no complete answer within {FETCH_SECONDS_MAX:.0f} s") from error
        raise NotReachable(f"more than {REDIRECTS_MAX} redirects")

    async def _once(self, url: str, bytes_max: Callable[[str], tuple[int, bool]]) -> Page | str:
        """One request: the page, or where it redirects to."""
        parsed = httpx.URL(url)
        headers = {
            "host": parsed.netloc.decode("ascii"),
            "user-agent": USER_AGENT,
            "accept": "text/html,application/xhtml+xml,application/pdf,text/*;q=0.9,application/json;q=0.8,*/*;q=0.1",
            "accept-encoding": "gzip, deflate",
            "connection": "close",
        }
        timeouts = {"connect": CONNECT_SECONDS, "read": FETCH_SECONDS_MAX, "write": CONNECT_SECONDS, "pool": CONNECT_SECONDS}
        try:
            # A pool for each request: nothing is shared between sessions, and no connection outlives its check.
            async with httpcore.AsyncConnectionPool(ssl_context=self._tls, network_backend=self._backend) as pool:
                target = httpcore.URL(
                    scheme=parsed.raw_scheme, host=parsed.raw_host, port=parsed.port, target=parsed.raw_path or b"/"
                )
                async with pool.stream("GET", target, headers=list(headers.items()), extensions={"timeout": timeouts}) as answer:
                    found = httpx.Headers(answer.headers)
                    if answer.status in REDIRECTS and "location" in found:
                        return _joined(parsed, found["location"])
                    content_type, charset = _content_type(found.get("content-type", ""))
                    size, strict = bytes_max(content_type)
                    body, cut = await _read(answer.aiter_stream(), found.get("content-encoding", ""), size)
                    if cut and strict:
                        raise BodyTooLarge(f"the body is larger than {size} bytes")
                    return Page(url, answer.status, content_type, charset, body, cut)
        except (
            httpcore.NetworkError,
            httpcore.ProtocolError,
            httpcore.TimeoutException,
            ssl.SSLError,
            OSError,
            UnicodeError,
        ) as error:
            raise NotReachable(str(error) or type(error).__name__) from error


def check_url(url: str) -> None:
    """Refuse what is not a plain http or https URL. Raises NotAllowed."""
    if len(url) > URL_CHARS_MAX or any(ord(char) <= 32 or ord(char) == 127 for char in url):
        raise NotAllowed("the URL is too long or contains spaces or control characters")
    try:
        parsed = httpx.URL(url)
        host = parsed.host  # raises for names whose IDNA form is broken, `xn--` say
    except (httpx.InvalidURL, UnicodeError) as error:
        raise NotAllowed(f"it is not a URL ({error})") from error
    if parsed.scheme not in ("http", "https") or not host or not 0 < (parsed.port or 80) <= 65535:
        raise NotAllowed("only http and https URLs can be fetched")
    if parsed.userinfo:
        raise NotAllowed("URLs with credentials are not fetched")


def _joined(url: httpx.URL, location: str) -> str:
    try:
        return str(url.join(location).copy_with(fragment=None))
    except (httpx.InvalidURL, UnicodeError) as error:
        raise NotReachable("it redirects to something that is not a URL") from error


def _content_type(header: str) -> tuple[str, str | None]:
    kind, *parameters = header.split(";")
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip().lower() == "charset":
            return kind.strip().lower(), value.strip(" \"'")[:40] or None
    return kind.strip().lower(), None


async def _read(chunks: AsyncIterator[bytes], coding: str, size: int) -> tuple[bytes, bool]:
    """Read at most `size` bytes of the decoded body; says whether there was more. A bomb is never inflated further."""
    coding = coding.strip().lower()
    if coding not in ("", "identity", "gzip", "x-gzip", "deflate"):
        raise CodingUnknown(coding[:50])
    inflate = None if coding in ("", "identity") else zlib.decompressobj(wbits=47)  # 47: zlib or gzip, whichever it is
    body = bytearray()
    try:
        async for chunk in chunks:
            body += chunk if inflate is None else inflate.decompress(chunk, size + 1 - len(body))
            if len(body) > size:
                return bytes(body[:size]), True
    except zlib.error as error:
        raise NotReachable("the body's compression is broken") from error
    return bytes(body), False
