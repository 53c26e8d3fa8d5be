"""The egress gateway where it ends TLS, against TLS over plain loopback: throughput, and what it adds to a request."""

import socket
import ssl
import threading
import time
from collections.abc import Callable

import anyio.to_thread
from pydantic import SecretStr

from managed_agents.egress.substitution import Substitution
from tests.bench.figures import Figure, best, ms
from tests.bench.stack import Stack
from tests.support.egress import Way, way_out

HOST = "site.test"
TRANSFER_BYTES = 64 * 1024**2
CHUNK_BYTES = 256 * 1024
ROUNDS = 3
REQUESTS = 100
SHARE_MIN = 0.3
ADDED_MAX = 0.001


async def measure(_stack: Stack) -> list[Figure]:
    async with way_out() as way:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port: int = listener.getsockname()[1]
            threading.Thread(target=_serve, args=(listener, way.world.context(HOST)), daemon=True).start()
            authority = f"{HOST}:{port}"
            way.names[HOST] = [["127.0.0.1"]]
            way.lender.lend(HOST, port, Substitution(set_headers={"authorization": SecretStr("Bearer token")}))

            def direct() -> ssl.SSLSocket:
                return _inside(socket.create_connection(("127.0.0.1", port)), way.world.pem)

            def ours() -> ssl.SSLSocket:
                return _inside(_tunnel(way, port), way.authority.pem)

            def rounds() -> tuple[list[float], list[float], list[list[float]], list[list[float]]]:
                plain, ended = ([_transfer(made, authority) for _ in range(ROUNDS)] for made in (direct, ours))
                firsts, added = ([_requests(made, authority) for _ in range(ROUNDS)] for made in (direct, ours))
                return plain, ended, firsts, added

            plain, ended, firsts, with_us = await anyio.to_thread.run_sync(rounds)
    added = best(with_us) - best(firsts)
    share = min(plain) / min(ended)
    gigabytes = TRANSFER_BYTES / 1024**3
    return [
        Figure(
            "egress, TLS ended, one download",
            f"{gigabytes / min(ended):.2f} GiB/s = {share:.2f} x TLS over loopback",
            f">= {SHARE_MIN} x TLS over loopback",
            share >= SHARE_MIN,
            f"TLS over loopback: {gigabytes / min(plain):.2f} GiB/s",
        ),
        Figure(
            "egress, TLS ended, added to a request",
            f"p50 {ms(added)}",
            f"<= {ms(ADDED_MAX)}",
            added <= ADDED_MAX,
            f"TLS over loopback: {ms(best(firsts))}",
        ),
    ]


def _serve(listener: socket.socket, context: ssl.SSLContext) -> None:
    """Answer requests for `/<number>` with as many bytes, until the listener is closed."""
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        threading.Thread(target=_converse, args=(connection, context), daemon=True).start()


def _converse(connection: socket.socket, context: ssl.SSLContext) -> None:
    chunk = bytes(CHUNK_BYTES)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with connection, context.wrap_socket(connection, server_side=True) as inside:
        while head := inside.recv(CHUNK_BYTES):
            wanted = int(head.split(b" ")[1][1:])
            inside.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % wanted + bytes(min(wanted, 1)))
            wanted -= 1
            while wanted > 0:
                wanted -= inside.send(chunk[:wanted])


def _inside(sock: socket.socket, authorities: str) -> ssl.SSLSocket:
    if sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return ssl.create_default_context(cadata=authorities).wrap_socket(sock, server_hostname=HOST)


def _tunnel(way: Way, port: int) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(way.socket_path))
    sock.sendall(f"CONNECT {HOST}:{port} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
    assert sock.recv(100).startswith(b"HTTP/1.1 200")
    return sock


def _fetch(inside: ssl.SSLSocket, authority: str, size: int, buffer: bytearray) -> None:
    inside.sendall(f"GET /{size} HTTP/1.1\r\nhost: {authority}\r\n\r\n".encode())
    received = inside.recv(CHUNK_BYTES)
    while b"\r\n\r\n" not in received:
        received += inside.recv(CHUNK_BYTES)
    rest = size - len(received.partition(b"\r\n\r\n")[2])
    while rest:
        rest -= inside.recv_into(buffer)


def _transfer(made: Callable[[], ssl.SSLSocket], authority: str) -> float:
    buffer = bytearray(CHUNK_BYTES)
    with made() as inside:
        started = time.perf_counter()
        _fetch(inside, authority, TRANSFER_BYTES, buffer)
        return time.perf_counter() - started


def _requests(made: Callable[[], ssl.SSLSocket], authority: str) -> list[float]:
    buffer = bytearray(CHUNK_BYTES)
    times: list[float] = []
    with made() as inside:
        for _ in range(REQUESTS):
            started = time.perf_counter()
            _fetch(inside, authority, 1, buffer)
            times.append(time.perf_counter() - started)
    return times[5:]
