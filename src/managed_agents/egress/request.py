"""What an HTTP proxy request asks for. Pure.

Both sides of the gateway are framed by h11, and a request is written anew from what was understood of it: nothing is passed on
that two parsers could read in two ways. What is ambiguous is refused.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from managed_agents.egress.policy import HTTPS_PORT, normal_host

Headers = Sequence[tuple[bytes, bytes]]

# Between two neighbours only (RFC 9110, 7.6.1), and what is meant for a proxy.
_HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-connection proxy-authorization proxy-authenticate te trailer transfer-encoding upgrade "
    b"http2-settings".split()
)
_AUTHORITY = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[^\[\]:@/\\?#%\s]+)(:(?P<port>[0-9]{1,5}))?")


class BadRequest(Exception):
    """The request is refused; the message says why."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where a request goes. `path` is what the server gets to see of the target; empty for a tunnel."""

    host: str
    port: int
    path: bytes = b""

    usual_port: int = 80

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == self.usual_port else f"{host}:{self.port}"


def _authority(text: str, default_port: int | None) -> Target:
    found = _AUTHORITY.fullmatch(text)
    host = normal_host(found["host"]) if found else None
    if found is None or host is None:
        raise BadRequest("the target names no host")
    if found["port"] is None and default_port is None:
        raise BadRequest("the target names no port")
    port = int(found["port"] or default_port or 0)
    if not 0 < port < 65536:
        raise BadRequest("the target's port is none")
    return Target(host, port)


def tunnel_target(target: bytes, headers: Headers) -> Target:
    """Where a CONNECT goes. Raises: BadRequest."""
    if any(name in (b"content-length", b"transfer-encoding") for name, _ in headers):
        raise BadRequest("CONNECT has no body")
    return _authority(target.decode("latin-1"), None)


def forward_target(target: bytes, headers: Headers) -> Target:
    """Where any other request goes. Raises: BadRequest."""
    text = target.decode("latin-1")
    scheme, separator, rest = text.partition("://")
    if not separator or scheme.lower() not in ("http", "https"):
        raise BadRequest("this is a proxy: ask for a whole URL, or CONNECT")
    if scheme.lower() == "https":
        raise BadRequest("https goes through CONNECT")
    if "#" in text or "\\" in text or not text.isascii():
        raise BadRequest("the target is no URL")
    authority = re.split(r"[/?]", rest, maxsplit=1)[0]
    wanted = _authority(authority, 80)
    path = rest[len(authority) :]
    _check(headers, wanted, 80)
    return Target(wanted.host, wanted.port, (path if path.startswith("/") else f"/{path}").encode())


def inner_target(method: bytes, target: bytes, headers: Headers, connected: Target) -> Target:
    """Where a request inside TLS goes, which is where the tunnel goes, or nowhere. Raises: BadRequest."""
    if method in (b"CONNECT", b"TRACE"):
        # A server that answers TRACE would show the sandbox what was written into the request.
        raise BadRequest(f"{method.decode('latin-1')} cannot be used here")
    if not target.startswith(b"/") and (method, target) != (b"OPTIONS", b"*"):
        raise BadRequest("the target is no path")
    if not target.isascii() or b"#" in target or b"\\" in target:
        raise BadRequest("the target is no path")
    if not any(name == b"host" for name, _ in headers):
        raise BadRequest("there is no Host header")
    _check(headers, connected, HTTPS_PORT)
    return Target(connected.host, connected.port, target, HTTPS_PORT)


def _check(headers: Headers, wanted: Target, default_port: int) -> None:
    """Raises: BadRequest."""
    names = [name for name, _ in headers]
    if b"transfer-encoding" in names and b"content-length" in names:
        raise BadRequest("Content-Length beside Transfer-Encoding")
    hosts = [value for name, value in headers if name == b"host"]
    if hosts and (len(hosts) > 1 or not _same(hosts[0], wanted, default_port)):
        raise BadRequest("the Host header names another host than the target")


def _same(value: bytes, wanted: Target, default_port: int) -> bool:
    try:
        named = _authority(value.decode("latin-1").strip(), default_port)
    except BadRequest:
        return False
    return (named.host, named.port) == (wanted.host, wanted.port)


def _named(headers: Headers) -> set[bytes]:
    """Headers that a `Connection` header makes hop-by-hop."""
    return {part.strip().lower() for name, value in headers if name == b"connection" for part in value.split(b",")}


def upgrade(headers: Headers) -> bytes | None:
    """The protocol that a request wants to go on with: WebSocket, or none."""
    wanted = [value.strip().lower() for name, value in headers if name == b"upgrade"]
    return b"websocket" if wanted == [b"websocket"] and b"upgrade" in _named(headers) else None


def forwarded(headers: Headers, *, also_without: Iterable[bytes] = ()) -> list[tuple[bytes, bytes]]:
    """What of the headers goes on to the other side, the body's framing included."""
    dropped = _HOP_BY_HOP | _named(headers) | set(also_without)
    kept = [(name, value) for name, value in headers if name not in dropped]
    # The framing is ours to say: h11 frames what it is told here.
    if any(name == b"transfer-encoding" for name, _ in headers):
        kept.append((b"transfer-encoding", b"chunked"))
    return kept
