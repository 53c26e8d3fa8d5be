"""Hosts, patterns, targets: what is decided without a connection."""

import pytest

from managed_agents.egress.policy import CachedPolicies, Policy, matches, normal_host
from managed_agents.egress.request import BadRequest, forward_target, forwarded, tunnel_target
from managed_agents.resources.sessions.egress import policy_of
from managed_agents.sandbox.package_hosts import hosts_in

pytestmark = pytest.mark.anyio


@pytest.mark.requirement("ENV-045")
@pytest.mark.parametrize(
    ("pattern", "host", "covered"),
    [
        ("example.com", "example.com", True),
        ("Example.COM.", "example.com", True),
        ("example.com", "www.example.com", False),
        ("*.example.com", "www.example.com", True),
        ("*.example.com", "a.b.example.com", True),
        ("*.example.com", "example.com", False),
        ("*.example.com", "badexample.com", False),
        ("*.example.com", "example.com.evil.test", False),
        ("10.0.0.1", "10.0.0.1", True),
    ],
)
def test_patterns(pattern: str, host: str, covered: bool) -> None:
    assert matches(pattern, host) is covered
    assert Policy("s", "limited", (pattern,)).allows(host) is covered


def test_unrestricted_allows_all_and_limited_without_hosts_nothing() -> None:
    assert Policy("s", "unrestricted").allows("example.com")
    assert not Policy("s", "limited").allows("example.com")


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("Example.COM", "example.com"),
        ("example.com.", "example.com"),
        ("[::1]", "::1"),
        ("[0:0:0:0:0:0:0:1]", "::1"),
        ("a_b.example", "a_b.example"),
        ("127.1", "127.1"),
        *(
            (bad, None)
            for bad in ("", ".", "a..b", "a b", "a%00b", "[fe80::1%25eth0]", "[::1", "-a", "exämple.com", "a/b", "x" * 300)
        ),
    ],
)
def test_normal_hosts(text: str, host: str | None) -> None:
    assert normal_host(text) == host


@pytest.mark.requirement("ENV-048")
@pytest.mark.parametrize(
    "target",
    [
        "example.com",
        "example.com:",
        "example.com:0",
        "example.com:65536",
        "example.com:1x",
        "http://a:1",
        "a@b:1",
        "a:1/",
        ":1",
        "[::1]",
    ],
)
def test_tunnels_to_nowhere_are_refused(target: str) -> None:
    with pytest.raises(BadRequest):
        tunnel_target(target.encode(), [])


@pytest.mark.requirement("ENV-048")
@pytest.mark.parametrize(
    ("target", "headers"),
    [
        ("/", []),
        ("*", []),
        ("https://a.test/", []),
        ("ftp://a.test/", []),
        ("http:///x", []),
        ("http://user@a.test/", []),
        ("http://a.test\\@b.test/", []),
        ("http://a.test#@b.test/", []),
        ("http://a.test/", [(b"host", b"b.test")]),
        ("http://a.test/", [(b"host", b"a.test:81")]),
        ("http://a.test/", [(b"host", b"a.test"), (b"host", b"a.test")]),
        ("http://a.test/", [(b"host", b"a.test, b.test")]),
        ("http://a.test/", [(b"content-length", b"1"), (b"transfer-encoding", b"chunked")]),
    ],
)
def test_ambiguous_requests_are_refused(target: str, headers: list[tuple[bytes, bytes]]) -> None:
    with pytest.raises(BadRequest):
        forward_target(target.encode(), headers)


def test_targets() -> None:
    found = forward_target(b"HTTP://A.test:8080?x=1", [(b"host", b"a.test:8080")])
    assert (found.host, found.port, found.path, found.authority) == ("a.test", 8080, b"/?x=1", "a.test:8080")
    assert forward_target(b"http://[::1]/a", []).authority == "[::1]"
    assert tunnel_target(b"[::FFFF:1.2.3.4]:443", []).host == "::ffff:102:304"
    with pytest.raises(BadRequest):
        tunnel_target(b"a.test:443", [(b"content-length", b"5")])


def test_headers_between_neighbours_are_not_passed_on() -> None:
    headers = [(b"connection", b"x-mine, close"), (b"x-mine", b"1"), (b"proxy-authorization", b"secret"), (b"accept", b"*/*")]
    assert forwarded(headers) == [(b"accept", b"*/*")]
    assert forwarded([(b"transfer-encoding", b"gzip, chunked")]) == [(b"transfer-encoding", b"chunked")]


@pytest.mark.requirement("ENV-046")
def test_what_opens_which_hosts() -> None:
    servers = [{"url": "https://mcp.example/sse"}, {"url": "https://[::1"}, {"url": None}]
    limited = {"type": "limited", "allowed_hosts": ["a.test"], "allow_mcp_servers": False, "allow_package_managers": False}
    assert policy_of("s", limited, servers, ["p.test"]).hosts == ("a.test", "p.test")[:1]
    assert policy_of("s", {**limited, "allow_mcp_servers": True}, servers, ()).hosts == ("a.test", "mcp.example")
    assert policy_of("s", {**limited, "allow_package_managers": True}, servers, ["p.test", "a.test"]).hosts == (
        "a.test",
        "p.test",
    )
    assert policy_of("s", {"type": "unrestricted"}, servers, ()).mode == "unrestricted"


def test_hosts_of_package_managers_are_read_from_what_they_print() -> None:
    printed = "url https://user:pw@Mirror.test/simple\nhost files.test\nurl direct\nurl file:///x\nhost \nnonsense\nurl http://mirror.test/\n"
    assert hosts_in(printed) == ["mirror.test", "files.test"]


async def test_policies_are_kept_for_five_seconds() -> None:
    asked: list[float] = []
    now = [0.0]

    class Source:
        async def policy(self, sandbox_id: str, generation: int) -> Policy | None:
            asked.append(now[0])
            return None

    cached = CachedPolicies(Source(), lambda: now[0])
    for now[0] in (0.0, 4.9, 5.0, 9.9, 10.0):
        await cached.policy("sbx", 1)
    assert asked == [0.0, 5.0, 10.0]
