"""The families of errors.

    ApiError        for callers: rendered as the API's error envelope by one handler
    TransientError  expected trouble: bounded backoff, a warning, a metric
    anything else   a bug: 500, traceback

`ApiError` subclasses are the only way a 4xx comes about.
"""

from collections.abc import Mapping


class ApiError(Exception):
    """An answer for the caller: HTTP `status`, envelope `type` and `message`, optional stable `error_code`."""

    def __init__(
        self,
        status: int,
        error_type: str,
        message: str,
        *,
        error_code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.error_type = error_type
        self.message = message
        self.error_code = error_code
        self.headers = dict(headers or {})


class InvalidRequest(ApiError):
    """400. `message` starts with the path of the offending field where there is one: `tools.0.name: …`."""

    def __init__(self, message: str, *, error_code: str | None = None) -> None:
        super().__init__(400, "invalid_request_error", message, error_code=error_code)


class AuthenticationFailed(ApiError):
    def __init__(self, message: str = "Authentication failed") -> None:
        super().__init__(401, "authentication_error", message)


class PermissionDenied(ApiError):
    def __init__(self, message: str, *, error_code: str | None = None) -> None:
        super().__init__(403, "permission_error", message, error_code=error_code)


class NotFound(ApiError):
    def __init__(self, message: str = "not found", *, error_code: str | None = None) -> None:
        super().__init__(404, "not_found_error", message, error_code=error_code)


class Conflict(ApiError):
    """409. Deterministic, so the SDK is told not to retry it (it retries 409 by default)."""

    def __init__(self, message: str, *, error_type: str = "conflict_error", error_code: str | None = None) -> None:
        super().__init__(409, error_type, message, error_code=error_code, headers={"x-should-retry": "false"})


class TooLarge(ApiError):
    def __init__(self, message: str, *, error_code: str | None = None) -> None:
        super().__init__(413, "request_too_large", message, error_code=error_code)


class RateLimited(ApiError):
    """429. `headers` say when to try again and which limit it was."""

    def __init__(self, message: str, *, headers: Mapping[str, str]) -> None:
        super().__init__(429, "rate_limit_error", message, headers=headers)


class TransientError(Exception):
    """Expected trouble with something outside this process; whoever catches it retries within a bound."""
