"""The gateway over real sockets, with servers on loopback, which the operator's setting allows."""

import os

import anyio
import pytest

from managed_agents.egress import http as egress_http
from managed_agents.egress.gateway import Bounds
from managed_agents.egress.policy import Policy
from tests.support.egress import WAIT_SECONDS, read_all, server, way_out
from tests.support.waiting import until

pytestmark = pytest.mark.anyio


def get(authority: str, *headers: str) -> bytes:
    return "\r\n".join(
        (f"GET http://{authority}/x HTTP/1.1", f"host: {authority}", *headers, "connection: close", "", "")
    ).encode()


def connect(authority: str) -> bytes:
    return f"CONNECT {authority} HTTP/1.1\r\nhost: {authority}\r\n\r\n".encode()


def status(answer: bytes) -> int:
    return int(answer.split(b" ")[1]) if answer else 0


def socks(host: str, port: int, kind: int = 3) -> bytes:
    return b"\5\1\0\5\1\0" + bytes([kind, len(host)]) + host.encode() + port.to_bytes(2, "big")


@pytest.mark.requirement("ENV-044", "ENV-050")
async def test_http_connect_and_socks_reach_a_server() -> None:
    async with way_out() as way, server() as site:
        way.names["site.test"] = [["127.0.0.1"]]
        forwarded = await way.ask(get(site.authority, "proxy-authorization: Basic eA==", "x-mine: yes"))
        assert forwarded.startswith(b"HTTP/1.1 200")
        assert forwarded.endswith(b"\r\n\r\nhello")
        seen = site.requests[0]
        assert seen.startswith(f"GET /x HTTP/1.1\r\nhost: {site.authority}\r\n".encode())
        assert b"x-mine: yes" in seen
        assert b"proxy" not in seen
        # What comes right behind the CONNECT is for the server.
        tunnelled = await way.ask(connect(site.authority) + b"through")
        assert tunnelled == b"HTTP/1.1 200 Connection established\r\n\r\n" + site.answer
        through_socks = await way.ask(socks("site.test", site.port) + b"socks")
        assert through_socks == b"\5\0" + b"\5\0\0\1\0\0\0\0\0\0" + site.answer
        assert site.requests[1:] == [b"through", b"socks"]
        entries = await way.logged(3)
        assert [(entry.protocol, entry.outcome, entry.host, entry.port) for entry in entries] == [
            (protocol, "allowed", "site.test", site.port) for protocol in ("http", "connect", "socks")
        ]
        assert [entry.bytes_sent for entry in entries] == [len(seen), 7, 5]
        assert all(entry.session_id == "sesn_1" for entry in entries)


async def test_several_requests_share_a_connection_and_bodies_pass_both_ways() -> None:
    answer = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"
    async with way_out() as way, server(answer) as site:
        way.names["site.test"] = [["127.0.0.1"]]
        post = f"POST http://{site.authority}/ HTTP/1.1\r\nhost: {site.authority}\r\ntransfer-encoding: chunked\r\n\r\n"
        answers = await way.ask(post.encode() + b"3\r\nabc\r\n0\r\n\r\n" + get(site.authority))
        assert answers.count(b"HTTP/1.1 200 OK") == 2
        assert answers.count(b"5\r\nhello\r\n0\r\n\r\n") == 2
        assert site.connections == 2  # each has its own to the server
        assert b"\r\ntransfer-encoding: chunked\r\n" in site.requests[0]


async def test_big_transfers_arrive_whole() -> None:
    async with way_out() as way, server(echo=True) as site:
        way.names["site.test"] = [["127.0.0.1"]]
        stream = await way.connect()
        data = os.urandom(1 << 20) * 8
        async with stream, anyio.create_task_group() as group:
            await stream.send(connect(site.authority))
            assert (await stream.receive()).startswith(b"HTTP/1.1 200")
            received = bytearray()

            async def read() -> None:
                while len(received) < len(data):
                    received.extend(await stream.receive())

            with anyio.fail_after(WAIT_SECONDS):
                group.start_soon(read)
                await stream.send(data)
                await stream.send_eof()
                await until(lambda: len(received) == len(data), seconds=WAIT_SECONDS)
            assert received == data


@pytest.mark.requirement("ENV-045")
async def test_what_is_not_allowed_is_a_403_that_names_the_host() -> None:
    async with way_out() as way, server() as site:
        way.names = {"site.test": [["127.0.0.1"]], "below.site.test": [["127.0.0.1"]]}
        way.allow("*.site.test")
        refused = await way.ask(get(site.authority))
        assert status(refused) == 403
        assert refused.endswith(b"site.test is not among the hosts that this environment's networking allows.\n")
        assert (await way.ask(connect(site.authority))).startswith(b"HTTP/1.1 403 site.test is not among the hosts")
        assert await way.ask(socks("site.test", site.port)) == b"\5\0\5\2\0\1\0\0\0\0\0\0"
        assert site.connections == 0
        assert status(await way.ask(get(f"below.site.test:{site.port}"))) == 200
        way.policies.clear()
        assert status(await way.ask(get(f"below.site.test:{site.port}"))) == 403
        way.unknown = True
        assert status(await way.ask(get(f"below.site.test:{site.port}"))) == 503
        assert [entry.outcome for entry in await way.logged(4)] == ["blocked", "blocked", "blocked", "allowed"]


@pytest.mark.requirement("ENV-047")
async def test_addresses_are_judged_however_they_are_given() -> None:
    hosts = ["localhost", "127.0.0.1", "127.1", "2130706433", "0x7f000001", "0177.0.0.1", "0", "169.254.169.254", "10.0.0.1"]
    hosts += ["[::1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[64:ff9b::7f00:1]", "[2002:7f00:1::]", "[fe80::1]", "[::]"]
    async with way_out(allowed="") as way, server() as site:
        for host in hosts:
            for request in (get, connect):
                answer = await way.ask(request(f"{host}:{site.port}"))
                # Some forms no resolver knows; none is reached.
                assert status(answer) in (403, 502), (host, answer)
        for host in ("169.254.169.254", "100.100.100.200", "168.63.129.16", "192.0.0.192", "[::ffff:168.63.129.16]", "[3fff::1]"):
            assert status(await way.ask(get(f"{host}:80"))) == 403, host
        plain = b"\5\1\0" + b"\5\1\0\1" + bytes([127, 0, 0, 1]) + site.port.to_bytes(2, "big")
        assert (await way.ask(plain))[2:4] == b"\5\2"
        mapped = b"\5\1\0" + b"\5\1\0\4" + bytes(10) + b"\xff\xff\x7f\0\0\1" + site.port.to_bytes(2, "big")
        assert (await way.ask(mapped))[2:4] == b"\5\2"
        assert site.connections == 0


@pytest.mark.requirement("ENV-047")
async def test_a_name_that_changes_its_address_gains_nothing() -> None:
    async with way_out(allowed="127.0.0.1/32") as way, server() as site:
        # Good at the first look, bad at any other: there is only one.
        way.names["rebind.test"] = [["127.0.0.1"], ["127.0.0.2"]]
        assert status(await way.ask(get(f"rebind.test:{site.port}"))) == 200
        assert status(await way.ask(get(f"rebind.test:{site.port}"))) == 403
        # Of several addresses the unacceptable ones are not tried.
        way.names["both.test"] = [["127.0.0.2", "::1", "127.0.0.1"]]
        assert status(await way.ask(get(f"both.test:{site.port}"))) == 200
        assert [entry.outcome for entry in await way.logged(3)] == ["allowed", "refused_address", "allowed"]


@pytest.mark.requirement("ENV-047")
async def test_a_redirect_to_the_metadata_address_is_the_clients_to_follow_and_refused_then() -> None:
    moved = b"HTTP/1.1 302 Found\r\nlocation: http://169.254.169.254/latest\r\ncontent-length: 0\r\n\r\n"
    async with way_out() as way, server(moved) as site:
        way.names["site.test"] = [["127.0.0.1"]]
        assert b"location: http://169.254.169.254/latest" in await way.ask(get(site.authority))
        assert status(await way.ask(get("169.254.169.254"))) == 403


@pytest.mark.requirement("ENV-048")
@pytest.mark.parametrize(
    "request_",
    [
        b"GET / HTTP/1.1\r\nhost: site.test\r\n\r\n",
        b"GET http://site.test:PORT/ HTTP/1.1\r\nhost: other.test\r\n\r\n",
        b"POST http://site.test:PORT/ HTTP/1.1\r\nhost: site.test:PORT\r\ncontent-length: 3\r\n"
        b"transfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET http://site.test:PORT/ HTTP/1.1\r\nhost: site.test:PORT\r\ncontent-length: 3\r\ncontent-length: 4\r\n\r\nabc",
        b"GET http://site.test:PORT/ HTTP/1.1\r\nhost : site.test:PORT\r\n\r\n",
        b"GET http://site.test:PORT/ HTTP/1.1\r\nhost: site.test:PORT\r\nx: a\0b\r\n\r\n",
        b"GET http://site.test:PORT/a b HTTP/1.1\r\nhost: site.test:PORT\r\n\r\n",
        b"GET http://other.test@site.test:PORT/ HTTP/1.1\r\n\r\n",
        b"CONNECT site.test:PORT HTTP/1.1\r\nhost: site.test\r\ncontent-length: 4\r\n\r\nabcd",
        b"CONNECT http://site.test:PORT HTTP/1.1\r\nhost: site.test\r\n\r\n",
        b"CONNECT site.test:PORT@other.test:1 HTTP/1.1\r\nhost: site.test\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"GET http://site.test:PORT/ HTTP/1.1\r\nhost: site.test:PORT\r\nx: " + b"a" * 100_000 + b"\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
)
async def test_tricks_reach_nobody(request_: bytes) -> None:
    async with way_out() as way, server() as site:
        way.names["site.test"] = [["127.0.0.1"]]
        answer = await way.ask(request_.replace(b"PORT", str(site.port).encode()))
        assert status(answer) == 400, answer
        assert site.connections == 0
        assert status(await way.ask(get(site.authority))) == 200  # the others go on


@pytest.mark.requirement("ENV-048")
async def test_a_servers_nonsense_ends_with_its_request() -> None:
    async with way_out() as way, server(b"\x00\x01 nonsense\r\n\r\n") as site:
        way.names["site.test"] = [["127.0.0.1"]]
        assert status(await way.ask(get(site.authority))) == 502
        site.answer = b"HTTP/1.1 200 OK\r\ncontent-length: 50\r\n\r\nshort"
        assert (await way.ask(get(site.authority))).endswith(b"short")  # cut off, and told by the length
        site.answer = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nokHTTP/1.1 200 OK\r\nx: smuggled\r\n\r\n"
        assert b"smuggled" not in await way.ask(get(site.authority))


async def test_what_cannot_be_reached_says_why() -> None:
    async with way_out() as way, server() as site:
        way.names = {"gone.test": [["127.0.0.1"]]}
        refused = await way.ask(get("gone.test:1"))
        assert status(refused) == 502
        assert b"gone.test:1 cannot be reached: Connection refused" in refused
        unknown = await way.ask(get("nowhere.invalid"))
        assert status(unknown) == 502
        assert b"nowhere.invalid cannot be resolved" in unknown
        assert (await way.ask(socks("nowhere.invalid", site.port)))[2:4] == b"\5\4"


@pytest.mark.requirement("ENV-050")
async def test_connections_and_traffic_are_bounded() -> None:
    async with way_out(bounds=Bounds(connections=2, bytes=1000)) as way, server(echo=True) as site:
        way.names["site.test"] = [["127.0.0.1"]]
        async with await way.connect() as one, await way.connect() as two:
            for stream in (one, two):
                await stream.send(connect(site.authority))
                assert (await stream.receive()).startswith(b"HTTP/1.1 200")
            assert b"too many connections" in await way.ask(b"")
            await one.send(b"x" * 800)
            with anyio.fail_after(WAIT_SECONDS):
                await read_all(one)  # back and forth it is more than the bound: the tunnel ends
        refused = await way.ask(get(site.authority))
        assert status(refused) == 403
        assert b"used up" in refused
        assert "over_limit" in [entry.outcome for entry in await way.logged(1)]


@pytest.mark.requirement("ENV-048")
async def test_slow_heads_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(egress_http, "HEAD_SECONDS_MAX", 0.2)
    async with way_out() as way, server():
        stream = await way.connect()
        async with stream:
            await stream.send(b"GET http://site.te")
            with anyio.fail_after(WAIT_SECONDS):
                assert await read_all(stream) == b""


@pytest.mark.requirement("ENV-051")
async def test_sandboxes_that_come_and_go_leave_nothing_behind() -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    async with way_out() as way, server() as site:
        way.names["site.test"] = [["127.0.0.1"]]
        await way.ask(connect(site.authority) + b"x")
        before = descriptors()
        other = way.directory / "sbx_2.1" / "egress"
        other.mkdir(parents=True)
        way.policies["sbx_2", 1] = Policy("sesn_2", "limited")
        await until((other / "egress.sock").exists, seconds=WAIT_SECONDS)
        stream = await anyio.connect_unix(other / "egress.sock")
        (other / "egress.sock").unlink()
        other.rmdir()
        other.parent.rmdir()
        with anyio.fail_after(WAIT_SECONDS):
            assert await read_all(stream) == b""  # its connections end with it
        await stream.aclose()
        for _ in range(20):
            await way.ask(connect(site.authority) + b"x")
            await way.ask(get("127.0.0.2:1"))
        await until(lambda: descriptors() <= before, seconds=WAIT_SECONDS)
