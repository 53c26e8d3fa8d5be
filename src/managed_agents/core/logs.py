"""Logging: one JSON object a line on stderr, with the request id of the task where there is one."""

import logging
import sys
import time
from contextvars import ContextVar

import orjson

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)

_STANDARD = frozenset(vars(logging.LogRecord("", 0, "", 0, "", (), None))) | {
    "message",
    "asctime",
    "taskName",
    "color_message",  # uvicorn's second form of its message, for terminals
}


REPEAT_SECONDS = 60.0


class Trouble:
    """One kind of trouble that is retried for as long as it lasts: said when it begins, once a minute, and when it is over."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._since: float | None = None
        self._said_at = 0.0

    def report(self, message: str, *arguments: object) -> None:
        """It happened (again)."""
        now = time.monotonic()
        if self._since is None:
            self._since = now
        elif now - self._said_at < REPEAT_SECONDS:
            return
        self._said_at = now
        self._logger.warning(message, *arguments, extra={"for_seconds": round(now - self._since, 1)})

    def over(self, message: str, *arguments: object) -> None:
        """It went well: says so when there was trouble before."""
        if self._since is not None:
            self._logger.info(message, *arguments, extra={"for_seconds": round(time.monotonic() - self._since, 1)})
            self._since = None


class JsonFormatter(logging.Formatter):
    """Render a record and its `extra` fields as one line of JSON."""

    def __init__(self, role: str) -> None:
        super().__init__()
        self._role = role

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "at": self.formatTime(record, "%Y-%m-%dT%H:%M:%S") + f".{int(record.msecs):03d}",
            "level": record.levelname.lower(),
            "role": self._role,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if (rid := request_id.get()) is not None:
            line["request_id"] = rid
        line.update({k: v for k, v in vars(record).items() if k not in _STANDARD})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return orjson.dumps(line, default=str).decode()


def configure(role: str, level: str) -> None:
    """Send every logger's records to stderr as JSON lines. Call once per process."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(role))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # Every start would say twice how Alembic sets itself up; what it changes is told all the same.
    logging.getLogger("alembic.runtime.migration").addFilter(lambda record: record.getMessage().startswith("Running"))
    for noisy in ("httpx", "httpx2", "httpcore", "httpcore2", "anthropic", "asyncio", "aiodocker"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
