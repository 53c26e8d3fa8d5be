"""The harness's client of the Messages API: one streamed request at a time, failures as our own error
classes.

The headers, the key's among them, are those of the official SDK; the request itself goes past it, because what
the SDK does around each one takes as long again as sending it, at every step of every turn. Nothing is tried
again here: retrying is visible to users and therefore the harness's job. Endpoint and key come from `Endpoint`
only; no environment variable of the SDK has a say.

Cancellation closes the connection at once, which is how the upstream learns to stop generating. Every wait
is bounded: connecting by `MODEL_CONNECT_SECONDS`, silence and the whole body of an error by
`MODEL_STALL_SECONDS`, the whole response by `MODEL_REQUEST_SECONDS` (in a stream looked at whenever bytes
arrive, so exceeded by one silence at most).
"""

import logging
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, Protocol, cast

import anyio
import httpx2
import orjson
from anthropic import AsyncAnthropic, DefaultAsyncHttpxClient

from managed_agents.core.limits import MODEL_CONNECT_SECONDS, MODEL_REQUEST_SECONDS, MODEL_STALL_SECONDS
from managed_agents.model.endpoint import Endpoint
from managed_agents.model.errors import (
    BadRequest,
    Cut,
    ModelError,
    ServerFailed,
    Stalled,
    error_of_event,
    error_of_status,
    redacted,
)
from managed_agents.model.events import (
    JsonObject,
    MessageFinished,
    MessageFold,
    ModelEvent,
    ModelRequest,
    ProtocolBroken,
)
from managed_agents.model.sse import EventTooLarge, SseParser

logger = logging.getLogger(__name__)

POOLS_MAX = 32  # a pool's bookkeeping is linear in its connections: many small ones for hundreds of streams
STREAMS_PER_POOL = 64
KEEPALIVE_SECONDS = 30.0  # shorter than servers keep idle connections, or the first byte meets a closed one
DRAIN_SECONDS = 0.5
CLOSE_SECONDS = 2.0
RESPONSE_BYTES_MAX = 128 * 1024 * 1024
ERROR_BYTES_MAX = 1024 * 1024  # more of an error's body is not read


class ModelClient(Protocol):
    """What the harness needs of a model."""

    def stream(self, request: ModelRequest) -> AbstractAsyncContextManager[AsyncIterator[ModelEvent]]:
        """Send `request`; the events end with `MessageFinished`.

        Raises: a ModelError, on entering or while iterating. Cancelling or leaving closes the connection.
        """
        ...


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Bounds of one request."""

    connect_seconds: float = MODEL_CONNECT_SECONDS
    stall_seconds: float = MODEL_STALL_SECONDS
    request_seconds: float = MODEL_REQUEST_SECONDS


class SealedAnthropic(AsyncAnthropic):
    """The SDK's client without what it takes from the environment: headers, tracing, URL, credentials."""

    def __init__(self, endpoint: Endpoint, http_client: httpx2.AsyncClient) -> None:
        super().__init__(
            api_key=endpoint.api_key.get_secret_value(),
            base_url=endpoint.base_url,
            max_retries=0,
            http_client=http_client,
            open_telemetry=False,
        )
        self._custom_headers = {}  # ANTHROPIC_CUSTOM_HEADERS could carry another service's credentials


def http_client(endpoint: Endpoint, deadlines: Deadlines, verify: ssl.SSLContext | bool) -> httpx2.AsyncClient:
    """Return one connection pool. Proxy variables count, except for a loopback endpoint."""
    limits = httpx2.Limits(
        max_connections=None,
        max_keepalive_connections=STREAMS_PER_POOL,
        keepalive_expiry=KEEPALIVE_SECONDS,
    )
    connect = deadlines.connect_seconds
    timeout = httpx2.Timeout(deadlines.stall_seconds, connect=connect, pool=connect)
    if endpoint.is_loopback:
        return httpx2.AsyncClient(limits=limits, timeout=timeout, follow_redirects=False, trust_env=False, mounts={})
    return DefaultAsyncHttpxClient(limits=limits, timeout=timeout, follow_redirects=False, verify=verify)


@dataclass(slots=True)
class _Pool:
    http: httpx2.AsyncClient
    client: SealedAnthropic
    headers: httpx2.Headers
    extensions: dict[str, Any]
    streams: int = 0


class AnthropicModelClient:
    """`ModelClient` over HTTP. One per process; `aclose` ends its connections."""

    def __init__(self, endpoint: Endpoint, *, deadlines: Deadlines | None = None) -> None:
        self._deadlines = deadlines or Deadlines()
        self._endpoint = endpoint
        self._url: httpx2.URL | None = None
        self._secret = endpoint.api_key.get_secret_value()
        # Made once: loading the certificates takes tens of milliseconds.
        self._verify = httpx2.create_ssl_context() if endpoint.base_url.startswith("https:") else True
        self._pools = [self._new_pool()]

    @property
    def anthropic(self) -> AsyncAnthropic:
        """The SDK client, for endpoints other than messages."""
        return self._pools[0].client

    async def aclose(self) -> None:
        """Close all connections."""
        for pool in self._pools:
            await pool.client.close()

    def _new_pool(self) -> "_Pool":
        http = http_client(self._endpoint, self._deadlines, self._verify)
        client = SealedAnthropic(self._endpoint, http)
        headers = {name: value for name, value in client.default_headers.items() if isinstance(value, str)}
        own = {"content-type": "application/json", "accept": "text/event-stream"}
        headers = {name: value for name, value in headers.items() if name.lower() not in own} | own
        all_headers = httpx2.Headers(http.headers)
        # As UTF-8, like the SDK: a key with other characters than ASCII is the endpoint's to refuse.
        all_headers.update(httpx2.Headers(headers, encoding="utf-8"))
        return _Pool(http, client, all_headers, {"timeout": http.timeout.as_dict()})

    def _pool(self) -> "_Pool":
        """Return the first pool with room, so that few streams share few warm connections."""
        for pool in self._pools:
            if pool.streams < STREAMS_PER_POOL:
                return pool
        if len(self._pools) < POOLS_MAX:
            self._pools.append(self._new_pool())
            return self._pools[-1]
        return min(self._pools, key=lambda pool: pool.streams)

    @asynccontextmanager
    async def stream(self, request: ModelRequest) -> AsyncGenerator[AsyncIterator[ModelEvent]]:
        """See `ModelClient.stream`."""
        deadline = time.monotonic() + self._deadlines.request_seconds
        pool = self._pool()
        pool.streams += 1
        try:
            response = await self._open(pool, request, deadline)
            chunks = response.aiter_bytes()
            reading = _Reading(chunks, response.headers.get("request-id"), deadline, self._secret)
            try:
                async with aclosing(reading.events()) as events:
                    yield events
                if reading.finished:  # read the end of the body, so that the connection can be used again
                    with anyio.move_on_after(DRAIN_SECONDS):
                        await reading.drain()
            finally:
                with anyio.CancelScope(shield=True), anyio.move_on_after(CLOSE_SECONDS):
                    await response.aclose()
        finally:
            pool.streams -= 1

    async def _open(self, pool: "_Pool", request: ModelRequest, deadline: float) -> httpx2.Response:
        try:
            content = orjson.dumps({**request.body, "stream": True})
        except TypeError as error:
            raise BadRequest(f"The request cannot be encoded: {error}") from error
        try:
            headers = pool.headers
            if request.betas:
                headers = headers.copy()
                headers["anthropic-beta"] = ",".join(request.betas)
            if self._url is None:
                # Here, so that one that cannot be is told like every other failure; once, because it takes long.
                self._url = httpx2.URL(f"{self._endpoint.base_url.rstrip('/')}/v1/messages")
            built = httpx2.Request(
                "POST", self._url, content=content, headers=headers, cookies=pool.http.cookies, extensions=dict(pool.extensions)
            )
            with anyio.fail_after(deadline - time.monotonic()):  # a head that comes byte by byte is no silence
                response = await pool.http.send(built, stream=True)
        except (httpx2.ConnectTimeout, httpx2.PoolTimeout) as error:
            raise Cut("No connection to the model endpoint in time") from error
        except (httpx2.TimeoutException, TimeoutError) as error:
            raise Stalled("The model endpoint did not answer in time") from error
        except httpx2.LocalProtocolError:
            # Its text shows the header in question as escaped bytes: the key, in a form in which it is not found and taken out.
            raise Cut("The request to the model endpoint cannot be written as HTTP: a header is invalid") from None
        except httpx2.HTTPError as error:
            raise Cut(redacted(f"No connection to the model endpoint: {error}", self._secret)) from error
        except Exception as error:
            # The boundary to the libraries below, which let through what they did not foresee (an ExceptionGroup for a port that
            # cannot be). No failure of one endpoint may end the worker's run of the session as a bug would.
            message = f"No request to the model endpoint: {type(error).__name__}: {error}"
            raise Cut(redacted(message, self._secret)) from error
        content_type = response.headers.get("content-type", "")
        if response.is_success and content_type.startswith("text/event-stream"):
            return response
        try:
            if not response.is_success:
                raise await self._refusal(response, deadline)
            shown = content_type[:100] or "no content type"
            raise ServerFailed(f"The model endpoint answered a stream request with {shown}")
        finally:
            with anyio.CancelScope(shield=True), anyio.move_on_after(CLOSE_SECONDS):
                await response.aclose()

    async def _refusal(self, response: httpx2.Response, deadline: float) -> ModelError:
        """Translate an answer that is no success. No key survives in the message."""
        read = bytearray()
        seconds = min(self._deadlines.stall_seconds, deadline - time.monotonic())
        try:
            with anyio.move_on_after(seconds):  # the whole body: one that trickles is no silence
                async for chunk in response.aiter_bytes():
                    read += chunk
                    if len(read) > ERROR_BYTES_MAX:
                        break
        except httpx2.HTTPError as error:
            logger.info("body of status %d of the model endpoint not read: %s", response.status_code, type(error).__name__)
        try:
            body: object = orjson.loads(read)
        except orjson.JSONDecodeError:
            body = None  # the status alone has to do
        return error_of_status(
            response.status_code,
            body,
            request_id=response.headers.get("request-id"),
            retry_after=retry_after_seconds(response.headers),
            secret=self._secret,
        )


class _Reading:
    """One response body being read."""

    def __init__(self, chunks: AsyncIterator[bytes], request_id: str | None, deadline: float, secret: str) -> None:
        self._chunks = chunks
        self._request_id = request_id
        self._deadline = deadline
        self._secret = secret
        self.finished = False

    async def events(self) -> AsyncGenerator[ModelEvent]:
        fold = MessageFold(self._request_id)
        parser = SseParser()
        size = 0
        async with aclosing(self._translated()) as chunks:
            async for chunk in chunks:
                size += len(chunk)
                if time.monotonic() > self._deadline:
                    raise Stalled("The response did not end in time", request_id=self._request_id)
                if size > RESPONSE_BYTES_MAX:
                    raise ServerFailed("The response is too large", request_id=self._request_id)
                try:
                    for name, data in parser.feed(chunk):
                        event = self._event(fold, name, data)
                        if event is not None:
                            self.finished = isinstance(event, MessageFinished)
                            yield event
                        if self.finished:
                            return
                except (ProtocolBroken, EventTooLarge, orjson.JSONDecodeError) as error:
                    message = f"The response is not a Messages API stream: {error}"
                    raise ServerFailed(redacted(message, self._secret), request_id=self._request_id) from error
        raise Cut("The response ended before the message did", request_id=self._request_id)

    def _event(self, fold: MessageFold, name: bytes, data: bytes) -> ModelEvent | None:
        if name == b"ping":
            return None
        decoded = orjson.loads(data)
        if name == b"error":
            raise error_of_event(decoded, request_id=self._request_id, secret=self._secret)
        if not isinstance(decoded, dict):
            raise ProtocolBroken("event data is not an object")
        return fold.fold(cast("JsonObject", decoded))

    async def _translated(self) -> AsyncGenerator[bytes]:
        try:
            async for chunk in self._chunks:
                yield chunk
        except httpx2.ReadTimeout as error:
            raise Stalled("The response fell silent", request_id=self._request_id) from error
        except httpx2.LocalProtocolError:  # its text is not shown, see `_open`
            raise Cut("The connection broke inside the response", request_id=self._request_id) from None
        except (httpx2.TransportError, httpx2.StreamError) as error:
            message = redacted(f"The connection broke inside the response: {error}", self._secret)
            raise Cut(message, request_id=self._request_id) from error
        except httpx2.DecodingError as error:
            raise ServerFailed("The response's encoding is broken", request_id=self._request_id) from error

    async def drain(self) -> None:
        """Read what follows the last event. Errors do not matter any more: the message is complete."""
        try:
            async for _ in self._chunks:
                pass
        except httpx2.HTTPError:
            return


def retry_after_seconds(headers: httpx2.Headers) -> float | None:
    """Return what `retry-after` asks for: seconds or a date; None when absent or senseless."""
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return None
    return min(max(seconds, 0.0), 86_400.0) if seconds == seconds else None
