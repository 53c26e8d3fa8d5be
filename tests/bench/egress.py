"""The egress gateway against plain loopback: throughput of a tunnel, and what it adds to the first byte."""

import socket
import threading
import time
from pathlib import Path

import anyio
import anyio.to_thread

from tests.bench.figures import Figure, best, ms
from tests.bench.stack import Stack
from tests.support.egress import way_out

TRANSFER_BYTES = 256 * 1024**2
ROUNDS = 3
CONNECTS = 100
SHARE_MIN = 0.3
ADDED_MAX = 0.001


async def measure(_stack: Stack) -> list[Figure]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=_serve, args=(listener,), daemon=True).start()
        port: int = listener.getsockname()[1]
        async with way_out() as way:
            path = way.socket_path

            def rounds() -> tuple[float, float, list[list[float]], list[list[float]]]:
                plain = [_seconds(_direct(port), TRANSFER_BYTES) for _ in range(ROUNDS)]
                tunnelled = [_seconds(_tunnel(path, port), TRANSFER_BYTES) for _ in range(ROUNDS)]
                firsts = [[_first(lambda: _direct(port)) for _ in range(CONNECTS)] for _ in range(ROUNDS)]
                ours = [[_first(lambda: _tunnel(path, port)) for _ in range(CONNECTS)] for _ in range(ROUNDS)]
                return min(plain), min(tunnelled), firsts, ours

            plain, tunnelled, firsts, ours = await anyio.to_thread.run_sync(rounds)
    added = best(ours) - best(firsts)
    share = plain / tunnelled
    gigabytes = TRANSFER_BYTES / 1024**3
    return [
        Figure(
            "egress tunnel, one connection",
            f"{gigabytes / tunnelled:.2f} GiB/s = {share:.2f} x loopback",
            f">= {SHARE_MIN} x loopback",
            share >= SHARE_MIN,
            f"loopback: {gigabytes / plain:.2f} GiB/s",
        ),
        Figure(
            "egress, added to connecting and the first byte",
            f"p50 {ms(added)}",
            f"<= {ms(ADDED_MAX)}",
            added <= ADDED_MAX,
            f"loopback: {ms(best(firsts))}",
        ),
    ]


def _serve(listener: socket.socket) -> None:
    """Send as many bytes as eight bytes ask for, until the listener is closed."""
    chunk = bytes(256 * 1024)
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        with connection:
            wanted = int.from_bytes(connection.recv(8), "big")
            while wanted:
                wanted -= connection.send(chunk[:wanted])


def _direct(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port))


def _tunnel(path: Path, port: int) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(path))
    sock.sendall(f"CONNECT 127.0.0.1:{port} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
    assert sock.recv(100).startswith(b"HTTP/1.1 200")
    return sock


def _seconds(sock: socket.socket, size: int) -> float:
    buffer = bytearray(256 * 1024)
    started = time.perf_counter()
    with sock:
        sock.sendall(size.to_bytes(8, "big"))
        while size:
            size -= sock.recv_into(buffer)
    return time.perf_counter() - started


def _first(connected: object) -> float:
    assert callable(connected)
    started = time.perf_counter()
    sock = connected()
    _seconds(sock, 1)
    return time.perf_counter() - started
