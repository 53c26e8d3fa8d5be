"""Answers. Handlers build plain values and hand them over once; nothing validates them a second time."""

from typing import Any

import orjson
from starlette.responses import Response


class Json(Response):
    """A JSON answer, encoded once."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return orjson.dumps(content)
