"""The Messages API over HTTP: routes, checks of headers and size, and the sending of what a script says.

Nothing here depends on the rest of the package, so that the server under test and its model meet only on
the wire. A request is recorded before it is answered, and its record says how it ended, which is how a test
sees that a client which was cancelled really closed its connection.
"""

import hashlib
import logging
from collections import Counter, OrderedDict
from pathlib import Path
from typing import cast

import anyio
import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from managed_agents.scripted_model import rules
from managed_agents.scripted_model.catalog import MODELS, Model, find_model
from managed_agents.scripted_model.checks import JsonObject, Refused
from managed_agents.scripted_model.record import Record, Recorder
from managed_agents.scripted_model.reply import Fail, ScriptError, parts_of
from managed_agents.scripted_model.request import Request
from managed_agents.scripted_model.script import Script, load_script
from managed_agents.scripted_model.signing import DEFAULT_KEY, EMPTY, Signer, digest_of
from managed_agents.scripted_model.usage import PrefixCache, count_tokens
from managed_agents.scripted_model.wire import Broken, Played, Player, Wait, envelope, new_id, refusal_body

BODY_BYTES_MAX = 32 * 1024 * 1024
VERSIONS = ("2023-01-01", "2023-06-01", "2026-10-21")
ATTEMPTS_KEPT_MAX = 20_000
_JSON = "application/json"

_log = logging.getLogger(__name__)


class ScriptedModel:
    """The state of one scripted model: script, cache, counters, records."""

    def __init__(self, script: Script, *, log_requests: Path | None = None, signing_key: bytes = DEFAULT_KEY) -> None:
        self.script = script
        self.recorder = Recorder(log_requests)
        self._signer = Signer(signing_key)
        self._cache = PrefixCache()
        self._attempts: OrderedDict[bytes, int] = OrderedDict()
        self._counters: Counter[str] = Counter()

    def reset(self) -> None:
        """Forget requests, counters and cache; the script stays."""
        self.recorder.clear()
        self._cache.clear()
        self._attempts.clear()
        self._counters.clear()

    def play(self, raw: bytes, headers: dict[str, str], request_id: str) -> tuple[Played, bool]:
        """Check a request, let the script answer, and say whether a stream is wanted. Raises: Refused."""
        body = _parsed(raw)
        model = rules.check_create(body, self._signer)
        request = cast("JsonObject", body)
        usage = self._cache.account(request, model)
        self._check_context(usage.total, model)
        seen = Request(request, headers, self._attempt(raw), self._count)
        prefix = digest_of(seen.messages) if rules.is_thinking(request, model) else EMPTY
        try:
            reply = [] if request["max_tokens"] == 0 else parts_of(self.script.reply(seen))
            played = Player(request, model, usage, self._signer, prefix).play(reply, request_id)
        except ScriptError as error:
            raise Refused(f"Script {self.script.name}: {error}", status=500, error_type="api_error") from error
        except Exception as error:  # a supervisor: whatever a user's script raises is that request's 500
            _log.warning("script %s failed", self.script.name, exc_info=True)
            message = f"Script {self.script.name} raised {type(error).__name__}: {error}"
            raise Refused(message, status=500, error_type="api_error") from error
        return played, request.get("stream") is True

    def count_tokens(self, raw: bytes) -> int:
        """Return the size of a prompt. Raises: Refused."""
        body = _parsed(raw)
        rules.check_count_tokens(body, self._signer)
        return count_tokens(cast("JsonObject", body))

    def listed(self, name: str) -> JsonObject:
        """Return one model as `GET /v1/models` shows it. Raises: Refused 404."""
        shown = find_model(name).listing()
        if self.script.max_input_tokens is not None:
            shown["max_input_tokens"] = self.script.max_input_tokens
        return shown

    def _check_context(self, tokens: int, model: Model) -> None:
        most = self.script.max_input_tokens or model.context_tokens
        if tokens > most:
            raise Refused(f"prompt is too long: {tokens} tokens > {most} maximum")

    def _attempt(self, raw: bytes) -> int:
        key = hashlib.blake2b(raw, digest_size=16).digest()
        attempt = self._attempts.pop(key, 0) + 1
        self._attempts[key] = attempt
        while len(self._attempts) > ATTEMPTS_KEPT_MAX:
            self._attempts.popitem(last=False)
        return attempt

    def _count(self, key: str) -> int:
        self._counters[key] += 1
        return self._counters[key]


class _MessageStream(Response):
    """Sends a stream's steps; a client that goes away ends it at once."""

    def __init__(self, played: Played, request_id: str, recorder: Recorder, record: Record) -> None:
        self._played = played
        self._request_id = request_id
        self._recorder = recorder
        self._record = record
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"request-id", self._request_id.encode()),
        ]
        self._record.state = "streaming"
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        steps = self._played.steps
        state = "disconnected"
        try:
            if len(steps) == 1 and isinstance(steps[0], bytes):
                await send({"type": "http.response.body", "body": steps[0], "more_body": False})
                state = "finished"
                return
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(_cancel_on_disconnect, receive, tasks.cancel_scope)
                state = await self._send_steps(send)
                tasks.cancel_scope.cancel()
        finally:
            self._recorder.finish(self._record, state)

    async def _send_steps(self, send: Send) -> str:
        for step in self._played.steps:
            if isinstance(step, Wait):
                await anyio.sleep(step.seconds)
            elif isinstance(step, Broken):
                return "cut"  # returning without the end of the body makes the server drop the connection
            else:
                await send({"type": "http.response.body", "body": step, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        return "finished"


async def _cancel_on_disconnect(receive: Receive, scope: anyio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()


def _parsed(raw: bytes) -> object:
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise Refused(f"The request body is not valid JSON: {error}") from error


async def _read_body(request: HttpRequest) -> bytes:
    too_large = Refused("Request exceeds the maximum size", status=413, error_type="request_too_large")
    if int(request.headers.get("content-length") or 0) > BODY_BYTES_MAX:
        raise too_large
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > BODY_BYTES_MAX:
            raise too_large
        chunks.append(chunk)
    return b"".join(chunks)


def _check_headers(request: HttpRequest) -> None:
    headers = request.headers
    bearer = headers.get("authorization", "").removeprefix("Bearer ").strip()
    if not headers.get("x-api-key") and not bearer:
        raise Refused("x-api-key header is required", status=401, error_type="authentication_error")
    version = headers.get("anthropic-version")
    if version is None:
        raise Refused("anthropic-version: header is required")
    if version not in VERSIONS:
        raise Refused(f'anthropic-version: "{version}" is not a valid version')


def create_app(script: Script | None = None, *, log_requests: Path | None = None, signing_key: bytes = DEFAULT_KEY) -> Starlette:
    """Return the ASGI application that plays `script` (the built-in one when None)."""
    model = ScriptedModel(script or load_script(None), log_requests=log_requests, signing_key=signing_key)
    api = _Api(model)
    app = Starlette(
        routes=[
            Route("/v1/messages", api.create_message, methods=["POST"]),
            Route("/v1/messages/count_tokens", api.count_tokens, methods=["POST"]),
            Route("/v1/models", api.list_models, methods=["GET"]),
            Route("/v1/models/{name:path}", api.retrieve_model, methods=["GET"]),
            Route("/_scripted/healthz", api.healthz, methods=["GET"]),
            Route("/_scripted/requests", api.list_requests, methods=["GET"]),
            Route("/_scripted/wait", api.wait, methods=["GET"]),
            Route("/_scripted/reset", api.reset, methods=["POST"]),
        ],
        exception_handlers={Refused: _on_refused, HTTPException: _on_http_exception},
    )
    app.state.model = model
    return app


def _answer(content: object, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(orjson.dumps(content), status_code=status, media_type=_JSON, headers=headers)


async def _on_refused(_request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, Refused)
    request_id = new_id("req")
    body = refusal_body(error, request_id)
    return Response(body, status_code=error.status, media_type=_JSON, headers={"request-id": request_id})


async def _on_http_exception(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        return await _on_refused(request, Refused("Method Not Allowed", status=405))
    return await _on_refused(request, Refused("Not found", status=error.status_code, error_type="not_found_error"))


class _Api:
    def __init__(self, model: ScriptedModel) -> None:
        self._model = model

    async def create_message(self, request: HttpRequest) -> Response:
        recorder = self._model.recorder
        request_id = new_id("req")
        _check_headers(request)
        raw = await _read_body(request)
        headers = request.headers
        record = recorder.receive(request_id, request.url.path, request.url.query, headers.get("anthropic-beta", ""), raw)
        try:
            played, streams = self._model.play(raw, _told(request), request_id)
        except Refused as error:
            return self._failed(record, error.status, refusal_body(error, request_id), error.message)
        if played.delay_seconds and not await _stayed(request, played.delay_seconds):
            recorder.finish(record, "disconnected")
            raise ClientDisconnect
        if played.fail is not None:
            return self._scripted_failure(record, played.fail)
        record.status = 200
        if streams:
            return _MessageStream(played, request_id, recorder, record)
        recorder.finish(record, "finished")
        return _answer(played.message, headers={"request-id": request_id})

    def _failed(self, record: Record, status: int, body: bytes, message: str, headers: dict[str, str] | None = None) -> Response:
        record.status, record.error = status, message
        self._model.recorder.finish(record, "finished")
        named = {"request-id": record.request_id, **(headers or {})}
        return Response(body, status_code=status, media_type=_JSON, headers=named)

    def _scripted_failure(self, record: Record, fail: Fail) -> Response:
        body = orjson.dumps(envelope(fail.error_type, fail.message, record.request_id))
        headers = {} if fail.retry_after is None else {"retry-after": f"{fail.retry_after:g}"}
        return self._failed(record, fail.status, body, fail.message, headers)

    async def count_tokens(self, request: HttpRequest) -> Response:
        _check_headers(request)
        tokens = self._model.count_tokens(await _read_body(request))
        return _answer({"input_tokens": tokens}, headers={"request-id": new_id("req")})

    async def list_models(self, request: HttpRequest) -> Response:
        _check_headers(request)
        names = list(MODELS)
        limit = _whole(request, "limit", 20)
        if not 1 <= limit <= 1000:
            raise Refused("limit: Input should be between 1 and 1000")
        after, before = request.query_params.get("after_id"), request.query_params.get("before_id")
        for cursor, name in (("after_id", after), ("before_id", before)):
            if name is not None and name not in MODELS:
                raise Refused(f"{cursor}: unknown model {name}")
        if before is not None:
            rest = names[: names.index(before)]
            page, more = rest[-limit:], len(rest) > limit
        else:
            rest = names[names.index(after) + 1 :] if after is not None else names
            page, more = rest[:limit], len(rest) > limit
        return _answer(
            {
                "data": [self._model.listed(name) for name in page],
                "first_id": page[0] if page else None,
                "last_id": page[-1] if page else None,
                "has_more": more,
            }
        )

    async def retrieve_model(self, request: HttpRequest) -> Response:
        _check_headers(request)
        return _answer(self._model.listed(request.path_params["name"]))

    async def healthz(self, _request: HttpRequest) -> Response:
        return _answer({"status": "ok", "script": self._model.script.name})

    async def list_requests(self, request: HttpRequest) -> Response:
        records = self._model.recorder.since(_whole(request, "since", 0))
        return _answer({"data": [record.view() for record in records], "total": self._model.recorder.total})

    async def wait(self, request: HttpRequest) -> Response:
        count, seconds = _whole(request, "count", 1), _whole(request, "seconds", 30)
        reached = await self._model.recorder.wait(count, request.query_params.get("state"), float(seconds))
        total = self._model.recorder.total
        return _answer({"reached": reached, "total": total}, status=200 if reached else 408)

    async def reset(self, _request: HttpRequest) -> Response:
        self._model.reset()
        return _answer({"status": "ok"})


def _whole(request: HttpRequest, name: str, default: int) -> int:
    given = request.query_params.get(name)
    if given is not None and not given.isdecimal():
        raise Refused(f"{name}: Input should be a valid integer")
    return default if given is None else int(given)


def _told(request: HttpRequest) -> dict[str, str]:
    """Return the headers a script may see: none that carries a key."""
    return {name: value for name, value in request.headers.items() if name not in ("authorization", "x-api-key", "cookie")}


async def _stayed(request: HttpRequest, seconds: float) -> bool:
    """Wait; return False as soon as the client goes away."""
    stayed = False
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(_cancel_on_disconnect, request.receive, tasks.cancel_scope)
        await anyio.sleep(seconds)
        stayed = True
        tasks.cancel_scope.cancel()
    return stayed
