"""Sites for the web tools to meet: pages good and bad, over real sockets, and a resolver that tells the names of tests."""

import gzip
import zlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.lowlevel
import orjson
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

from tests.support.server import listening

PAGE = """<!doctype html><html><head><title>A &amp; B</title><script>evil()</script></head><body>
<h1>Heading</h1><p>Some <b>bold</b> text, <a href="/next?x=1">a link</a>.</p><p style="display:none">hidden</p></body></html>"""
PDF = b"%PDF-1.4\nrest of the document"


def _body(content: bytes, media_type: str, **headers: str) -> Response:
    return Response(content, headers={"content-type": media_type, **{name.replace("_", "-"): v for name, v in headers.items()}})


async def _page(request: Request) -> Response:
    match request.path_params["name"]:
        case "html":
            return _body(PAGE.encode(), "text/html; charset=utf-8")
        case "latin":
            return _body("<html><meta charset=iso-8859-1><p>café".encode("latin-1"), "text/html")
        case "text":
            return _body(b"plain words", "text/plain")
        case "json":
            return _body(b'{"a": 1}', "application/json")
        case "pdf":
            return _body(PDF, "application/pdf")
        case "no-pdf":
            return _body(b"<html>", "application/pdf")
        case "image":
            return _body(b"\x89PNG\r\n", "image/png")
        case "empty":
            return _body(b"<html><script>1</script></html>", "text/html")
        case "long":
            return _body(b"word " * 50_000, "text/plain")
        case "gzip":
            return _body(gzip.compress(b"unpacked"), "text/plain", content_encoding="gzip")
        case "bomb":
            return _body(zlib.compress(b"x" * 200_000_000), "text/plain", content_encoding="deflate")
        case "broken-gzip":
            return _body(b"\x1f\x8b" + b"x" * 50, "text/plain", content_encoding="gzip")
        case "brotli":
            return _body(b"xx", "text/plain", content_encoding="br")
        case "nested":
            return _body(b"<div>" * 100_000 + b"deep", "text/html")
        case "injection":
            return _body(request.headers["host"].encode(), "text/plain")
        case _:
            return Response("no such page", status_code=404)


async def _status(request: Request) -> Response:
    return Response("x", status_code=int(request.path_params["status"]))


async def _typed(request: Request) -> Response:
    """The body and content type that are asked for."""
    return _body(bytes.fromhex(request.query_params["hex"]) * int(request.query_params["times"]), request.query_params["type"])


async def _redirect(request: Request) -> Response:
    return Response(status_code=302, headers={"location": request.query_params["to"]})


async def _loop(_request: Request) -> Response:
    return RedirectResponse("/loop", status_code=307)


async def _endless(request: Request) -> Response:
    async def chunks() -> AsyncIterator[bytes]:
        while True:
            yield b"x" * 65536
            await anyio.lowlevel.checkpoint()  # or nobody would notice that the reader has gone

    return StreamingResponse(chunks(), media_type=request.query_params.get("type", "text/plain"))


async def _slow(_request: Request) -> Response:
    async def chunks() -> AsyncIterator[bytes]:
        while True:
            yield b"x"
            await anyio.sleep(0.05)

    return StreamingResponse(chunks(), media_type="text/plain")


def _results(*urls: str, excerpt: str) -> list[dict[str, Any]]:
    return [{"url": url, "title": f"Title of {url}", excerpt: f"Excerpt of {url}"} for url in urls]


FOUND = ("https://docs.example.com/a", "https://example.org/b", "https://ads.example.net/c")


async def _searxng(request: Request) -> Response:
    assert request.query_params["format"] == "json"
    query = request.query_params["q"]
    if query.startswith("busy"):
        return Response("x", status_code=429)
    if query.startswith("broken"):
        return Response("<html>")
    found = [] if query.startswith("nothing") else _results(*FOUND, "ftp://no", excerpt="content")
    return Response(orjson.dumps({"query": query, "results": [*found, "odd", {"title": "no url"}]}))


async def _brave(request: Request) -> Response:
    if request.headers.get("x-subscription-token") != "brave-key":
        return Response("no key", status_code=401)
    seen = {name: value for name, value in request.headers.items() if name.startswith("x-loc")}
    results = _results(*FOUND, excerpt="description")
    results[0]["description"] = f"{request.query_params['q']} {request.query_params.get('country')} {sorted(seen.items())}"
    return Response(orjson.dumps({"web": {"results": results}}))


@asynccontextmanager
async def website() -> AsyncIterator[str]:
    """Serve everything; yields the base URL."""
    routes = [
        Route("/page/{name}", _page),
        Route("/status/{status}", _status),
        Route("/redirect", _redirect),
        Route("/typed", _typed),
        Route("/loop", _loop),
        Route("/endless", _endless),
        Route("/slow", _slow),
        Route("/search", _searxng),
        Route("/res/v1/web/search", _brave),
    ]
    async with listening(Starlette(routes=routes)) as url:
        yield url


class Names:
    """A resolver of made-up names; each answer is given once, the last one for ever. It remembers what it was asked."""

    def __init__(self, **answers: list[list[str]]) -> None:
        self._answers = {name.replace("_", "."): list(given) for name, given in answers.items()}
        self.asked: list[str] = []

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        self.asked.append(host)
        answers = self._answers.get(host)
        if answers is None:
            if host[0].isdigit():
                return [host]
            raise OSError("no such name")
        return answers.pop(0) if len(answers) > 1 else answers[0]
