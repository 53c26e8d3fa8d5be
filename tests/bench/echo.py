"""A bare ASGI echo: what a request through the same client and server costs when nothing is done."""

from typing import Any


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answer with the body of the request, an empty object when there is none."""
    body = b""
    more = True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": body or b"{}"})
