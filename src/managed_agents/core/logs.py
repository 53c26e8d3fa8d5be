"""Logging: one JSON object a line on stderr, with the request id of the task where there is one."""

import logging
import sys
from contextvars import ContextVar

import orjson

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)

_STANDARD = frozenset(vars(logging.LogRecord("", 0, "", 0, "", (), None))) | {
    "message",
    "asctime",
    "taskName",
    "color_message",  # uvicorn's second form of its message, for terminals
}


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
