"""Connections to the outside, made to addresses that were looked at.

A name is resolved once, and what is connected to is an address of that very answer that was found acceptable: a name that
resolves to something else a moment later gains nothing. What the resolver takes for a number (`127.1`, `0x7f000001`) comes
out as the address it stands for, and is judged as that.
"""

import contextlib
import errno
import os
import socket
from collections.abc import Mapping, Sequence
from typing import Protocol

import anyio

from managed_agents.core import addresses
from managed_agents.egress.access_log import Outcome
from managed_agents.egress.wire import Wire

RESOLVE_SECONDS_MAX = 10.0
CONNECT_SECONDS_MAX = 8.0
CONNECTS_SECONDS_MAX = 20.0
ADDRESSES_MAX = 6  # of one name that are tried


class Unreachable(Exception):
    """No connection could be made; the message is for the sandbox."""

    def __init__(self, message: str, outcome: Outcome, *, status: int = 502) -> None:
        super().__init__(message)
        self.outcome: Outcome = outcome
        self.status = status


class Resolver(Protocol):
    async def __call__(self, host: str, port: int) -> Sequence[str]:
        """Return addresses in order of preference. Raises: OSError."""
        ...


async def system_resolver(host: str, port: int) -> Sequence[str]:
    """As this machine resolves."""
    found = await anyio.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


class Connector:
    """Makes connections for sandboxes."""

    def __init__(
        self,
        exceptions: Sequence[addresses.Network] = (),
        resolver: Resolver = system_resolver,
        *,
        routes: Mapping[tuple[str, int], tuple[str, int]] | None = None,
    ) -> None:
        """`exceptions` are networks that an operator allows beside the public ones, `routes` where connections to a host and
        port really go; who answers there is still asked for the first one's certificate.
        """
        self._exceptions, self._resolver, self._routes = exceptions, resolver, routes or {}

    async def connect(self, host: str, port: int) -> Wire:
        """Connect to a host. Raises: Unreachable."""
        host, port = self._routes.get((host, port), (host, port))
        wanted = [address for address in await self._resolve(host, port) if self._acceptable(address)]
        if not wanted:
            raise Unreachable(f"{host} is at an address that sandboxes may not reach", "refused_address", status=403)
        failure = "no answer"
        with anyio.move_on_after(CONNECTS_SECONDS_MAX):
            for address in wanted[:ADDRESSES_MAX]:
                try:
                    with anyio.fail_after(CONNECT_SECONDS_MAX):
                        return Wire(await _connected(address, port))
                except TimeoutError:
                    failure = "no answer"
                except OSError as error:
                    failure = error.strerror or type(error).__name__
        raise Unreachable(
            f"{host}:{port} cannot be reached: {failure}", "unreachable", status=504 if failure == "no answer" else 502
        )

    async def _resolve(self, host: str, port: int) -> Sequence[str]:
        try:
            with anyio.fail_after(RESOLVE_SECONDS_MAX):
                return await self._resolver(host, port)
        except socket.gaierror as error:
            raise Unreachable(f"{host} cannot be resolved: {error.strerror}", "unresolved") from error
        except (OSError, UnicodeError) as error:  # TimeoutError is an OSError
            raise Unreachable(f"{host} cannot be resolved: {type(error).__name__}", "unresolved") from error

    def _acceptable(self, address: str) -> bool:
        if not addresses.allowed(address, self._exceptions):
            return False
        # This machine's own public addresses lead to its own ports; what an operator allows is meant.
        return not addresses.allowed(address) or not _is_ours(address)


def _is_ours(address: str) -> bool:
    """Whether packets to `address` stay on this machine: then the kernel would send them from that very address."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect((address, 9))
        return bool(probe.getsockname()[0] == address)
    return False


async def _connected(address: str, port: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        status = sock.connect_ex((address, port))
        if status == errno.EINPROGRESS:
            await anyio.wait_writable(sock)
            status = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if status != 0:
            raise OSError(status, os.strerror(status))
    except BaseException:
        sock.close()
        raise
    return sock
