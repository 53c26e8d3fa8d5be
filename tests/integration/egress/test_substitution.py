"""Credentials written into requests inside TLS, over real sockets, with HTTPS servers on loopback."""

import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import anyio.abc
import pytest
from anyio.streams.tls import TLSStream
from pydantic import SecretStr

from managed_agents.egress.substitution import Substitution
from tests.support.egress import WAIT_SECONDS, Server, Way, server, way_out

pytestmark = pytest.mark.anyio

TOKEN = Substitution(set_headers={"Authorization": SecretStr("Bearer s3cret")})


@asynccontextmanager
async def _conversation(way: Way, answers: list[bytes]) -> AsyncIterator[Server]:
    """An HTTPS server that says these one after the other, on as many connections as it takes."""
    way.names["site.test"] = [["127.0.0.1"]]
    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener, anyio.create_task_group() as group:
        made = Server(listener.extra(anyio.abc.SocketAttribute.local_port), b"")

        async def serve(stream: anyio.abc.SocketStream) -> None:
            made.connections += 1
            async with await TLSStream.wrap(
                stream, ssl_context=way.world.context("site.test"), standard_compatible=False
            ) as wrapped:
                try:
                    while True:
                        made.requests.append(await wrapped.receive())
                        await wrapped.send(answers.pop(0))
                except (anyio.EndOfStream, anyio.BrokenResourceError):
                    return

        group.start_soon(listener.serve, serve)
        yield made
        group.cancel_scope.cancel()


def get(site: Server, *headers: str, path: str = "/x") -> bytes:
    lines = (f"GET {path} HTTP/1.1", f"host: {site.authority}", *headers, "connection: close", "", "")
    return "\r\n".join(lines).encode()


def status(answer: bytes) -> int:
    return int(answer.split(b" ")[1]) if answer else 0


@pytest.mark.requirement("ENV-070")
async def test_a_header_is_set_and_the_sandbox_never_sees_it() -> None:
    async with way_out() as way, server(tls=way.world.context("site.test")) as site:
        way.names["site.test"] = [["127.0.0.1"]]
        way.lender.lend("site.test", site.port, TOKEN)
        answer = await way.ask_inside(site.authority, get(site, "authorization: Bearer mine", "x-mine: yes"))
        assert answer.endswith(b"\r\n\r\nhello")
        assert b"s3cret" not in answer
        [seen] = site.requests
        assert seen.startswith(f"GET /x HTTP/1.1\r\nhost: {site.authority}\r\n".encode())
        assert b"authorization: Bearer s3cret\r\n" in seen
        assert b"Bearer mine" not in seen
        assert b"x-mine: yes" in seen
        assert way.lender.asked == [("sesn_1", "secret_0")]
        [entry] = await way.logged(1)
        assert (entry.protocol, entry.outcome, entry.host, entry.bytes_received) == (
            "https",
            "allowed",
            "site.test",
            len(site.answer),
        )


async def test_hosts_without_credentials_are_tunnelled_unseen() -> None:
    async with way_out() as way, server(tls=way.authority.context("site.test")) as site:
        # The client trusts the gateway's authority only, and here that is what the server itself shows.
        way.names["site.test"] = [["127.0.0.1"]]
        way.lender.lend("other.test", site.port, TOKEN)
        assert (await way.ask_inside(site.authority, b"anything")).endswith(b"hello")
        assert site.requests == [b"anything"]
        assert way.lender.asked == []
        assert (await way.logged(1))[0].protocol == "connect"


@pytest.mark.requirement("ENV-070")
async def test_placeholders_are_replaced_where_they_are_to_be() -> None:
    async with way_out() as way, server(tls=way.world.context("site.test")) as site:
        way.names["site.test"] = [["127.0.0.1"]]
        way.lender.lend("site.test", site.port, Substitution(placeholder="PH_1", value=SecretStr("longer-secret"), in_body=True))
        basic = base64.b64encode(b"user:PH_1").decode()
        body = b'{"key": "PH_1", "more": "PH_"}'
        site.ending = b"}"
        head = f"POST /PH_1 HTTP/1.1\r\nhost: {site.authority}\r\nx-key: a PH_1 b\r\nauthorization: Basic {basic}\r\n"
        await way.ask_inside(site.authority, f"{head}content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode() + body)
        [seen] = site.requests
        assert b"x-key: a longer-secret b\r\n" in seen
        assert base64.b64encode(b"user:longer-secret") in seen
        assert seen.startswith(b"POST /PH_1 ")  # not where one is enabled
        expected = body.replace(b"PH_1", b"longer-secret")
        assert f"content-length: {len(expected)}\r\n".encode() in seen
        assert seen.endswith(expected)


async def _only_status(way: Way, site: Server, *headers: str, path: str = "/x") -> int:
    return status(await way.ask_inside(site.authority, get(site, *headers, path=path)))


@pytest.mark.requirement("ENV-072")
async def test_what_is_lent_for_paths_opens_those_paths_only() -> None:
    async with way_out() as way, server(tls=way.world.context("site.test")) as site:
        way.names["site.test"] = [["127.0.0.1"]]
        way.allow()
        way.lender.lend("site.test", site.port, TOKEN, paths=("/Owner/repo", "/Owner/repo.git"), opens=True)
        good = ["/owner/repo", "/Owner/Repo.git/info/refs?service=git-upload-pack", "/owner/repo/a..b"]
        bad = ["/owner/repository", "/owner/repo/../other", "/owner/repo/%2e%2e/other", "/owner//repo", "/owner/repo/./..", "/"]
        for path in good:
            assert await _only_status(way, site, path=path) == 200, path
            assert b"s3cret" in site.requests[-1]
        for path in bad:
            assert await _only_status(way, site, path=path) == 403, path
        assert len(site.requests) == len(good)
        way.allow("site.test")
        assert await _only_status(way, site, path="/owner/repo/../other") == 200
        assert b"s3cret" not in site.requests[-1]
        # In the clear nothing is opened.
        way.allow()
        assert status(await way.ask(f"GET http://{site.authority}/owner/repo HTTP/1.1\r\n\r\n".encode())) == 400
        plain = f"GET http://{site.authority}/owner/repo HTTP/1.1\r\nhost: {site.authority}\r\n\r\n"
        assert status(await way.ask(plain.encode())) == 403


@pytest.mark.requirement("ENV-070")
async def test_a_secret_that_is_gone_or_cannot_be_read() -> None:
    async with way_out() as way, server(tls=way.world.context("site.test")) as site:
        way.names["site.test"] = [["127.0.0.1"]]
        way.lender.lend("site.test", site.port, None)
        assert await _only_status(way, site, "authorization: Bearer mine") == 200
        assert b"Bearer mine" in site.requests[-1]
        way.lender.secrets.clear()
        assert await _only_status(way, site) == 503
        way.lender.secrets["secret_0"] = Substitution(set_headers={"x": SecretStr("a\r\nhost: evil")})
        answer = await way.ask_inside(site.authority, get(site))
        assert status(answer) == 503
        assert b"evil" not in answer
        assert len(site.requests) == 1


async def test_a_server_that_is_not_who_it_should_be_gets_nothing() -> None:
    async with way_out() as way, server(tls=way.authority.context("site.test")) as site:
        way.names["site.test"] = [["127.0.0.1"]]
        way.lender.lend("site.test", site.port, TOKEN)
        answer = await way.ask_inside(site.authority, get(site))
        assert status(answer) == 502
        assert b"has no valid TLS: unable to get local issuer certificate" in answer
        assert site.requests == []
        assert (await way.logged(1))[0].outcome == "unreachable"


async def test_requests_of_one_connection_share_one_to_the_server_while_it_is_clean() -> None:
    answers = [b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\n" + bytes([number]) for number in b"ab"]
    async with way_out() as way, _conversation(way, [*answers, answers[0] + b"more", answers[1]]) as site:
        way.lender.lend("site.test", site.port, TOKEN)
        async with way.inside(site.authority) as stream:
            with anyio.fail_after(WAIT_SECONDS):
                for number, said in enumerate((b"a", b"b", b"a", b"b")):
                    await stream.send(f"GET /{number} HTTP/1.1\r\nhost: {site.authority}\r\n\r\n".encode())
                    answer = b""
                    while not answer.endswith(b"\r\n\r\n" + said):
                        answer += await stream.receive()
                    assert b"more" not in answer
        assert [len(request.split(b"\r\n\r\n")) for request in site.requests] == [2] * 4
        assert site.connections == 2  # what a server says unasked is nobody's answer


async def test_a_server_that_closed_meanwhile_is_asked_on_another_connection() -> None:
    closing = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello"
    async with way_out() as way, server(closing, tls=way.world.context("site.test")) as site:
        way.names["site.test"] = [["127.0.0.1"]]
        way.lender.lend("site.test", site.port, TOKEN)
        async with way.inside(site.authority) as stream:
            for _ in range(2):
                with anyio.fail_after(WAIT_SECONDS):
                    await stream.send(f"GET / HTTP/1.1\r\nhost: {site.authority}\r\n\r\n".encode())
                    answer = b""
                    while not answer.endswith(b"hello"):
                        answer += await stream.receive()
                assert status(answer) == 200
        assert site.connections == 2


async def test_a_websocket_goes_on_through_the_gateway() -> None:
    switching = b"HTTP/1.1 101 Switching Protocols\r\nconnection: Upgrade\r\nupgrade: websocket\r\nsec-x: y\r\n\r\nfirst"
    async with way_out() as way, _conversation(way, [switching, b"pong"]) as site:
        way.lender.lend("site.test", site.port, TOKEN)
        async with way.inside(site.authority) as stream:
            with anyio.fail_after(WAIT_SECONDS):
                head = (
                    f"GET /ws HTTP/1.1\r\nhost: {site.authority}\r\nconnection: keep-alive, Upgrade\r\nupgrade: websocket\r\n\r\n"
                )
                await stream.send(head.encode())
                answer = b""
                while not answer.endswith(b"first"):
                    answer += await stream.receive()
                assert status(answer) == 101
                assert b"\r\nsec-x: y\r\n" in answer
                await stream.send(b"\x89\x00ping")
                assert await stream.receive() == b"pong"
        assert b"upgrade: websocket\r\n" in site.requests[0]
        assert b"Bearer s3cret" in site.requests[0]
        assert site.requests[1] == b"\x89\x00ping"
        [entry] = await way.logged(1)
        assert (entry.protocol, entry.outcome) == ("https", "allowed")
        assert entry.bytes_sent == sum(map(len, site.requests))
        assert entry.bytes_received == len(switching + b"pong")
