"""Credentials written into requests inside TLS, over real sockets, with HTTPS servers on loopback."""

import base64

import pytest
from pydantic import SecretStr

from managed_agents.egress.substitution import Substitution
from tests.support.egress import Server, Way, server, way_out

pytestmark = pytest.mark.anyio

TOKEN = Substitution(set_headers={"Authorization": SecretStr("Bearer s3cret")})


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
        assert (entry.protocol, entry.outcome, entry.host, entry.bytes_received) == ("https", "allowed", "site.test", 5)


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
