"""What a hostile sandbox tries where it would be lent a credential: nothing but its own well-formed requests leaves."""

import os
import ssl
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
import anyio.to_thread
import h11
import pytest
from anyio.streams.tls import TLSStream
from pydantic import SecretStr

from managed_agents.egress import http as egress_http
from managed_agents.egress import tls
from managed_agents.egress.gateway import Bounds
from managed_agents.egress.substitution import Substitution
from tests.support.egress import WAIT_SECONDS, Server, Way, read_all, server, way_out
from tests.support.waiting import until

pytestmark = pytest.mark.anyio

TOKEN = Substitution(set_headers={"authorization": SecretStr("Bearer s3cret")})
GET = b"GET / HTTP/1.1\r\nhost: AUTHORITY\r\nconnection: close\r\n\r\n"


@asynccontextmanager
async def _lending(**more: Any) -> AsyncIterator[tuple[Way, str, Server]]:
    """A gateway that lends a token to `site.test`, a TLS server."""
    async with way_out() as way, server(tls=way.world.context("site.test")) as site:
        way.names["site.test"] = [["127.0.0.1"]]
        way.lender.lend("site.test", site.port, TOKEN, **more)
        yield way, site.authority, site


@asynccontextmanager
async def _echo(way: Way) -> AsyncIterator[int]:
    """An HTTPS server that sends a request's body back while it comes."""
    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener, anyio.create_task_group() as group:

        async def serve(stream: anyio.abc.SocketStream) -> None:
            async with await TLSStream.wrap(stream, ssl_context=way.world.context("site.test")) as wrapped:
                connection = h11.Connection(h11.SERVER)
                while not isinstance(event := connection.next_event(), h11.EndOfMessage):
                    if event is h11.NEED_DATA:
                        connection.receive_data(await wrapped.receive())
                    elif isinstance(event, h11.Request):
                        answer = h11.Response(status_code=200, headers=[("transfer-encoding", "chunked")])
                        await wrapped.send(connection.send(answer) or b"")
                    elif isinstance(event, h11.Data):
                        await wrapped.send(connection.send(event) or b"")
                await wrapped.send(connection.send(h11.EndOfMessage()) or b"")

        group.start_soon(listener.serve, serve)
        yield listener.extra(anyio.abc.SocketAttribute.local_port)
        group.cancel_scope.cancel()


def status(answer: bytes) -> int:
    return int(answer.split(b" ")[1]) if answer else 0


@pytest.mark.requirement("ENV-071")
@pytest.mark.parametrize(
    "request_",
    [
        pytest.param(b"GET / HTTP/1.1\r\nhost: other.test\r\n\r\n", id="another host"),
        pytest.param(b"GET / HTTP/1.1\r\nhost: site.test:1\r\n\r\n", id="another port"),
        pytest.param(b"GET / HTTP/1.1\r\nhost: x@AUTHORITY\r\n\r\n", id="user in the host"),
        pytest.param(b"GET / HTTP/1.1\r\n\r\n", id="no host"),
        pytest.param(b"GET / HTTP/1.0\r\n\r\n", id="no host in the old version"),
        pytest.param(b"GET / HTTP/1.1\r\nhost: AUTHORITY\r\nhost: other.test\r\n\r\n", id="two hosts"),
        pytest.param(b"GET https://AUTHORITY/ HTTP/1.1\r\nhost: AUTHORITY\r\n\r\n", id="absolute form"),
        pytest.param(b"GET https://other.test/ HTTP/1.1\r\nhost: AUTHORITY\r\n\r\n", id="absolute form elsewhere"),
        pytest.param(b"GET @other.test/ HTTP/1.1\r\nhost: AUTHORITY\r\n\r\n", id="no path"),
        pytest.param(b"GET /a\\b HTTP/1.1\r\nhost: AUTHORITY\r\n\r\n", id="backslash"),
        pytest.param(b"CONNECT AUTHORITY HTTP/1.1\r\nhost: AUTHORITY\r\n\r\n", id="tunnel in the tunnel"),
        pytest.param(b"TRACE / HTTP/1.1\r\nhost: AUTHORITY\r\n\r\n", id="trace shows the request"),
        pytest.param(
            b"POST / HTTP/1.1\r\nhost: AUTHORITY\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
            id="two framings",
        ),
        pytest.param(
            b"POST / HTTP/1.1\r\nhost: AUTHORITY\r\ncontent-length: 3\r\ncontent-length: 4\r\n\r\nabcd", id="two lengths"
        ),
        pytest.param(b"POST / HTTP/1.1\r\nhost: AUTHORITY\r\ncontent-length: 3, 4\r\n\r\nabcd", id="two lengths in one"),
        pytest.param(b"POST / HTTP/1.1\r\nhost: AUTHORITY\r\ncontent-length: +3\r\n\r\nabc", id="signed length"),
        pytest.param(b"POST / HTTP/1.1\r\nhost: AUTHORITY\r\ntransfer-encoding: gzip, chunked\r\n\r\n", id="two codings"),
        pytest.param(b"POST / HTTP/1.1\r\nhost: AUTHORITY\r\ntransfer-encoding: \x0bchunked\r\n\r\n", id="odd coding"),
        pytest.param(b"GET / HTTP/1.1\r\nhost : AUTHORITY\r\n\r\n", id="space before the colon"),
        pytest.param(b"GET / HTTP/1.1\r\n host: AUTHORITY\r\n\r\n", id="space before the first header"),
        pytest.param(b"GET / HTTP/1.1\r\nhost: AUTHORITY\r\nx: a\0b\r\n\r\n", id="nul"),
        pytest.param(b"GET / HTTP/1.1\r\nhost: AUTHORITY\r\nx: a\rb: c\r\n\r\n", id="bare carriage return"),
        pytest.param(b"GET / HTTP/1.1\r\nhost: AUTHORITY\r\nx: " + b"a" * 100_000 + b"\r\n\r\n", id="huge header"),
        pytest.param(b"GET / HTTP/1.1\r\nhost: AUTHORITY\r\n" + b"x: y\r\n" * 20_000 + b"\r\n", id="many headers"),
        pytest.param(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", id="another version"),
        pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", id="tls in tls"),
    ],
)
async def test_tricks_inside_reach_nobody(request_: bytes) -> None:
    async with _lending() as (way, authority, site):
        answer = await way.ask_inside(authority, request_.replace(b"AUTHORITY", authority.encode()))
        assert status(answer) == 400, answer
        assert b"s3cret" not in answer
        assert site.connections == 0
        assert status(await way.ask_inside(authority, GET.replace(b"AUTHORITY", authority.encode()))) == 200


@pytest.mark.requirement("ENV-071")
async def test_what_parsers_read_differently_is_written_anew() -> None:
    async with _lending() as (way, authority, site):
        site.ending = b"0\r\n\r\n"
        folded = f"POST / HTTP/1.1\nhost: {authority}\r\nx: a\r\n\tb\r\nX-Connection: y\r\nconnection: close, authorization\r\n"
        body = "transfer-encoding: Chunked\r\n\r\n5;a=b\r\nhello\r\n000\r\ntrailer: evil\r\n\r\n"
        assert status(await way.ask_inside(authority, (folded + body).encode())) == 200
        [seen] = site.requests
        assert seen.startswith(f"POST / HTTP/1.1\r\nhost: {authority}\r\n".encode())
        assert b"\r\nx: a b\r\n" in seen
        assert b"\r\nauthorization: Bearer s3cret\r\n" in seen  # which `Connection` cannot take away
        assert seen.endswith(b"\r\n\r\n5\r\nhello\r\n0\r\n\r\n")
        assert b"evil" not in seen


async def test_what_follows_a_request_is_judged_by_itself() -> None:
    async with _lending(paths=("/mine",), opens=True) as (way, authority, site):
        way.allow()
        hidden = f"GET /other HTTP/1.1\r\nhost: {authority}\r\n\r\n"
        first = f"POST /mine HTTP/1.1\r\nhost: {authority}\r\ncontent-length: 0\r\n\r\n"
        answers = await way.ask_inside(authority, (first + hidden).encode())
        assert answers.count(b"HTTP/1.1 200 OK") == 1
        assert answers.count(b"HTTP/1.1 403 site.test is not among the hosts") == 1
        assert len(site.requests) == 1
        assert [(entry.protocol, entry.outcome) for entry in await way.logged(2)] == [("https", "allowed"), ("https", "blocked")]


@pytest.mark.requirement("ENV-071")
async def test_the_handshake_names_the_host_of_the_tunnel() -> None:
    async with _lending() as (way, authority, site):
        with pytest.raises((ssl.SSLError, anyio.BrokenResourceError)):
            async with way.inside(authority, name="other.test"):
                pass
        assert (await way.logged(1))[0].outcome == "bad_request"
        # What is no TLS gets no answer, and is passed on to nobody.
        for nonsense in (b"GET / HTTP/1.1\r\n\r\n", b"SSH-2.0-x\r\n", b"\x16\x03\x01\xff\xff" + bytes(70_000)):
            answer = await way.ask(f"CONNECT {authority} HTTP/1.1\r\nhost: x\r\n\r\n".encode() + nonsense)
            assert answer.startswith(b"HTTP/1.1 200 Connection established\r\n\r\n")
            assert b"s3cret" not in answer
        assert site.connections == 0


@pytest.mark.requirement("ENV-047", "ENV-071")
async def test_addresses_are_judged_inside_too() -> None:
    async with way_out(allowed="127.0.0.1/32") as way, server(tls=way.world.context("site.test")) as site:
        way.lender.lend("*", site.port, TOKEN)
        way.names["site.test"] = [["127.0.0.1"], ["10.0.0.1"], ["169.254.169.254"], ["::ffff:10.0.0.1"], ["fd00::1"]]
        get = GET.replace(b"AUTHORITY", site.authority.encode())
        assert status(await way.ask_inside(site.authority, get)) == 200
        for _ in range(4):
            assert status(await way.ask_inside(site.authority, get)) == 403
        for host in ("10.0.0.1", "[::1]", "[fd00::1]", "[64:ff9b::a00:1]", "169.254.169.254"):
            authority = f"{host}:{site.port}"
            assert status(await way.ask_inside(authority, GET.replace(b"AUTHORITY", authority.encode()))) == 403, host
        assert site.connections == 1


async def test_numbers_and_spellings_of_a_host_are_one_host() -> None:
    async with _lending() as (way, authority, site):
        for spelling in (authority.upper(), authority.replace(":", ".:"), authority.title()):
            async with way.inside(spelling, name="site.test") as stream:
                await stream.send(GET.replace(b"AUTHORITY", authority.encode()))
                assert status(await read_all(stream)) == 200, spelling
        assert len(site.requests) == 3
        for wrong in ("site.test:0", "site.test:65536", "site.test", "u:p@" + authority, f"site.test:{site.port}x"):
            assert status(await way.ask(f"CONNECT {wrong} HTTP/1.1\r\nhost: x\r\n\r\n".encode())) == 400, wrong


async def test_the_slow_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    async with _lending() as (way, authority, site):
        async with way.inside(authority) as stream:
            monkeypatch.setattr(egress_http, "HEAD_SECONDS_MAX", 0.2)
            with anyio.fail_after(WAIT_SECONDS):
                assert await read_all(stream) == b""
        monkeypatch.setattr(tls, "HANDSHAKE_SECONDS_MAX", 0.2)
        async with await way.connect() as raw:
            await raw.send(f"CONNECT {authority} HTTP/1.1\r\nhost: x\r\n\r\n".encode() + b"\x16\x03\x01\x02")
            with anyio.fail_after(WAIT_SECONDS):
                assert (await read_all(raw)).endswith(b"established\r\n\r\n")
        assert site.connections == 0


async def test_a_body_that_stops_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    async with _lending() as (way, authority, _), way.inside(authority) as stream:
        monkeypatch.setattr("managed_agents.egress.exchange.SILENCE_SECONDS_MAX", 0.2)
        await stream.send(f"POST / HTTP/1.1\r\nhost: {authority}\r\ncontent-length: 10\r\n\r\nabc".encode())
        with anyio.fail_after(WAIT_SECONDS):
            answer = await read_all(stream)
        assert answer == b"" or status(answer) in (200, 502)


async def test_bodies_stream_both_ways_inside() -> None:
    """More than any buffer, in chunks, with the placeholder across their borders; the echo is not scrubbed."""
    secret = Substitution(placeholder="PLACEHOLDER", value=SecretStr("s3cret"), in_body=True)
    async with way_out() as way, _echo(way) as port:
        way.names["site.test"] = [["127.0.0.1"]]
        authority = f"site.test:{port}"
        way.lender.lend("site.test", port, secret)
        pieces = [os.urandom(50_000), b"PLACE", b"HOLDER", os.urandom(900_000), b"PLACEHOLDERPLACEHOLDE"]
        expected = b"".join(pieces).replace(b"PLACEHOLDER", b"s3cret")
        for headers in ([("transfer-encoding", "chunked")], [("content-length", str(len(b"".join(pieces))))]):
            client = h11.Connection(h11.CLIENT)
            received = bytearray()
            async with way.inside(authority) as stream, anyio.create_task_group() as group:

                async def send(client: h11.Connection = client, stream: object = stream, headers: object = headers) -> None:
                    head = h11.Request(method="POST", target="/", headers=[("host", authority), *headers])  # type: ignore[misc]
                    for event in (head, *(h11.Data(data=piece) for piece in pieces), h11.EndOfMessage()):
                        await stream.send(client.send(event) or b"")  # type: ignore[attr-defined]

                with anyio.fail_after(WAIT_SECONDS):
                    group.start_soon(send)
                    while not isinstance(event := client.next_event(), h11.EndOfMessage):
                        if isinstance(event, h11.Data):
                            received += event.data
                        elif event is h11.NEED_DATA:
                            client.receive_data(await stream.receive())
            assert received == expected


async def test_one_sandbox_does_not_take_the_others_connections() -> None:
    async with way_out(bounds=Bounds(connections=100, connections_in_all=10)) as way, server(echo=True) as site:
        way.names["site.test"] = [["127.0.0.1"]]
        streams = [await way.connect() for _ in range(10)]
        for stream in streams:
            await stream.send(f"CONNECT {site.authority} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
            assert (await stream.receive()).startswith(b"HTTP/1.1 200")
        assert b"too many connections" in await way.ask(b"")
        other = way.directory / "sbx_2.1" / "egress"
        other.mkdir(parents=True)
        way.policies["sbx_2", 1] = way.policies["sbx_1", 1]
        await until((other / "egress.sock").exists, seconds=WAIT_SECONDS)
        async with await anyio.connect_unix(other / "egress.sock") as stream:
            await stream.send(f"CONNECT {site.authority} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
            assert (await stream.receive()).startswith(b"HTTP/1.1 200")
        for stream in streams:
            await stream.aclose()


_OTHER = """
import sys, anyio
from pathlib import Path
from tests.support.egress import way_out
async def main():
    async with way_out(directory=Path(sys.argv[1])):
        print("s", flush=True)
        await anyio.sleep_forever()
anyio.run(main)
"""


async def test_a_gateway_killed_in_mid_call_is_followed_by_the_one_that_waits() -> None:
    directory = Path(tempfile.mkdtemp(prefix="ma-", dir="/tmp"))
    async with await anyio.open_process([sys.executable, "-c", _OTHER, str(directory)]) as first:
        try:
            assert first.stdout is not None
            with anyio.fail_after(WAIT_SECONDS):
                assert await first.stdout.receive(1) == b"s"
            async with way_out(directory=directory) as way, server(echo=True) as site:
                connect = f"CONNECT 127.0.0.1:{site.port} HTTP/1.1\r\nhost: x\r\n\r\n".encode()
                async with await way.connect() as stream:
                    await stream.send(connect + b"before")
                    with anyio.fail_after(WAIT_SECONDS):
                        while not (await stream.receive()).endswith(b"before"):
                            pass
                        first.kill()
                        assert await read_all(stream) == b""  # told at once

                async def again() -> bool:
                    try:
                        async with await way.connect() as stream:
                            await stream.send(connect)
                            return (await stream.receive()).startswith(b"HTTP/1.1 200")
                    except (OSError, anyio.EndOfStream, anyio.BrokenResourceError):
                        return False

                await until(again, seconds=WAIT_SECONDS)
        finally:
            if first.returncode is None:
                first.kill()
