"""What goes wrong with a model request, in the harness's terms.

Every failure of `ModelClient.stream` is one of these. `retryable` says whether the same request may be sent
again; whether it is, and when, is the harness's decision. Invariant: neither message nor repr carries a
key.
"""

import re
from collections.abc import Mapping
from typing import ClassVar, cast

from managed_agents.core.errors import TransientError

MESSAGE_CHARS_MAX = 2_000
# The API has no error types of their own for these; the words are those of the real one and of servers that resemble it.
_NO_CREDIT = re.compile(r"credit balance is too low|usage limits", re.IGNORECASE)
_TOO_LONG = re.compile(r"prompt is too long|context (limit|window|length)|maximum context", re.IGNORECASE)


class ModelError(TransientError):
    """A model request failed. `message` and `request_id` are the upstream's, where it gave any.

    `retry_after` is how long the upstream asked to be left alone, in seconds.
    """

    retryable: ClassVar[bool] = True

    def __init__(
        self,
        message: str,
        *,
        retry_after: float | None = None,
        request_id: str | None = None,
        status: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after = retry_after
        self.request_id = request_id
        self.status = status

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.message!r}, request_id={self.request_id!r}, status={self.status!r})"


class Overloaded(ModelError):
    """529: the model has no capacity now."""


class RateLimited(ModelError):
    """429."""


class ServerFailed(ModelError):
    """5xx, or an answer that makes no sense."""


class Cut(ModelError):
    """No connection, or one that ended before the message did."""


class Stalled(ModelError):
    """Silence for longer than allowed, or a response that never ended."""


class BadRequest(ModelError):
    """400, 404, 413, 422 and other refusals of this very request: it will be refused again."""

    retryable = False


class TooLong(BadRequest):
    """The prompt is larger than the model's context, or the request larger than the endpoint takes."""


class Auth(ModelError):
    """401, 403: the key is not valid, or may not do this."""

    retryable = False


class Billing(ModelError):
    """402: no credit, or a spend limit."""

    retryable = False


_OF_TYPE: Mapping[str, type[ModelError]] = {
    "invalid_request_error": BadRequest,
    "request_too_large": TooLong,
    "not_found_error": BadRequest,
    "authentication_error": Auth,
    "permission_error": Auth,
    "billing_error": Billing,
    "rate_limit_error": RateLimited,
    "overloaded_error": Overloaded,
    "timeout_error": ServerFailed,
    "api_error": ServerFailed,
}
_OF_STATUS: Mapping[int, type[ModelError]] = {
    401: Auth,
    402: Billing,
    403: Auth,
    408: ServerFailed,
    409: ServerFailed,
    413: TooLong,
    429: RateLimited,
    529: Overloaded,
}


def error_of_status(
    status: int,
    body: object,
    *,
    request_id: str | None = None,
    retry_after: float | None = None,
    secret: str = "",
) -> ModelError:
    """Return the error for an answer that is no success. `secret` is taken out of the upstream's text."""
    kind, message, told_id = _envelope(body)
    message = redacted(message or f"The model endpoint answered with status {status}", secret)
    cls = _OF_STATUS.get(status, BadRequest if status < 500 else ServerFailed)
    if kind == "billing_error":
        cls = Billing  # observed: also sent with other statuses
    return _told(cls, message)(message, retry_after=retry_after, request_id=told_id or request_id, status=status)


def error_of_event(body: object, *, request_id: str | None = None, secret: str = "") -> ModelError:
    """Return the error for an `error` event inside a response, where only the envelope's type can tell."""
    kind, message, told_id = _envelope(body)
    cls = _OF_TYPE.get(kind or "", ServerFailed)
    message = redacted(message or "The model endpoint broke the response off with an error", secret)
    return _told(cls, message)(message, request_id=told_id or request_id)


def _told(cls: type[ModelError], message: str) -> type[ModelError]:
    """The class that the upstream's words mean, where its error type says only that the request is refused."""
    if cls is not BadRequest:
        return cls
    if _NO_CREDIT.search(message):
        return Billing
    return TooLong if _TOO_LONG.search(message) else BadRequest


def _envelope(body: object) -> tuple[str | None, str | None, str | None]:
    """Return type, message and request id of an error envelope, as far as `body` is one."""
    nothing: Mapping[str, object] = {}
    outer = cast("Mapping[str, object]", body) if isinstance(body, Mapping) else nothing
    error = outer.get("error")
    inner = cast("Mapping[str, object]", error) if isinstance(error, Mapping) else nothing
    kind, message, request_id = (
        value if isinstance(value, str) and value else None
        for value in (inner.get("type"), inner.get("message"), outer.get("request_id"))
    )
    return kind, message, request_id


def redacted(message: str, secret: str) -> str:
    """Return `message` without `secret`, at most `MESSAGE_CHARS_MAX` long."""
    return (message.replace(secret, "[key]") if secret else message)[:MESSAGE_CHARS_MAX]
