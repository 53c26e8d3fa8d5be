"""The beginning of a SOCKS5 connection (RFC 1928): no authentication, CONNECT only."""

import enum
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

from managed_agents.egress.policy import normal_host
from managed_agents.egress.wire import Wire

VERSION = 5
_NO_AUTHENTICATION = 0
_CONNECT = 1


class Reply(enum.IntEnum):
    GRANTED = 0
    FAILED = 1
    NOT_ALLOWED = 2
    HOST_UNREACHABLE = 4
    COMMAND_NOT_SUPPORTED = 7
    ADDRESS_TYPE_NOT_SUPPORTED = 8


class SocksRefused(Exception):
    """The client asks for what is not served; `reply` is to be sent, where there is one."""

    def __init__(self, reply: Reply | None) -> None:
        super().__init__("refused")
        self.reply = reply


@dataclass(frozen=True, slots=True)
class Wanted:
    host: str
    port: int


def encoded(reply: Reply) -> bytes:
    """A reply without the address that we connect from: it is of no use and tells about the host."""
    return bytes([VERSION, reply, 0, 1, 0, 0, 0, 0, 0, 0])


async def handshake(wire: Wire) -> Wanted:
    """Read up to the request; the version's byte was read. Raises: SocksRefused, OSError, EOFError."""
    [count] = await wire.receive_exactly(1)
    if _NO_AUTHENTICATION not in await wire.receive_exactly(count):
        await wire.send(bytes([VERSION, 0xFF]))
        raise SocksRefused(None)
    await wire.send(bytes([VERSION, _NO_AUTHENTICATION]))
    version, command, reserved, kind = await wire.receive_exactly(4)
    if version != VERSION or reserved != 0:
        raise SocksRefused(Reply.FAILED)
    if command != _CONNECT:
        raise SocksRefused(Reply.COMMAND_NOT_SUPPORTED)
    host = await _host(wire, kind)
    port = int.from_bytes(await wire.receive_exactly(2), "big")
    if host is None or port == 0:
        raise SocksRefused(Reply.FAILED)
    return Wanted(host, port)


async def _host(wire: Wire, kind: int) -> str | None:
    match kind:
        case 1:
            return str(IPv4Address(await wire.receive_exactly(4)))
        case 3:
            [length] = await wire.receive_exactly(1)
            name = await wire.receive_exactly(length)
            return normal_host(name.decode("ascii", "replace"))
        case 4:
            return str(IPv6Address(await wire.receive_exactly(16)))
        case _:
            raise SocksRefused(Reply.ADDRESS_TYPE_NOT_SUPPORTED)
