"""The file tools' process: one started ahead with the commands' uid, which forks for each request.

It is started by exec, so it holds nothing of the runner's memory, and commands of the same uid may attack
it: the runner treats what it answers as untrusted and replaces it when it dies. A request is a socket
handed over; the fork serves it and ends. When the runner closes its end, the kernel sends SIGIO, which ends
the fork in the midst of any computation.
"""

from __future__ import annotations

import fcntl
import gc
import json
import os
import signal
import socket
import sys

from . import frames, spill, transfer
from .config import Config
from .filetools import Block, edit, read, write
from .search import glob, grep
from .toolerror import ToolError, reason

TOOLS = {"read": read, "write": write, "edit": edit, "glob": glob, "grep": grep}
INPUT_BYTES_MAX = 64 * 1024 * 1024


def _end_with_peer(sock: socket.socket, wanted: bool) -> None:
    """Have the kernel end this process when the peer closes. Off while sending: room to write is an event
    as well.
    """
    flags = fcntl.fcntl(sock, fcntl.F_GETFL)
    if wanted:
        fcntl.fcntl(sock, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(sock, fcntl.F_SETFL, flags | os.O_ASYNC if wanted else flags & ~os.O_ASYNC)


def _tool(sock: socket.socket, header: frames.Header, config: Config) -> None:
    parts: list[bytes] = []
    size = 0
    while True:
        frame, body = frames.receive(sock)
        parts.append(body)
        size += len(body)
        if size > INPUT_BYTES_MAX:
            raise frames.FrameError("input too large")
        if not frame.get("more"):
            break
    _end_with_peer(sock, True)
    name, is_error = str(header["name"]), False
    content: list[Block]
    try:
        content = TOOLS[name](json.loads(b"".join(parts)), config)
        for block in content:
            if block["type"] == "text":
                block["text"] = spill.shown(name, block["text"], config)
    except ToolError as error:
        content, is_error = [{"type": "text", "text": str(error)}], True
    except OSError as error:
        content, is_error = (
            [{"type": "text", "text": f"{name}: {error.filename or ''}: {reason(error)}"}],
            True,
        )
    except (MemoryError, RecursionError) as error:
        content, is_error = [{"type": "text", "text": f"{name}: {type(error).__name__}"}], True
    _end_with_peer(sock, False)
    frames.send_message(sock, {"op": "outcome", "is_error": is_error}, json.dumps(content).encode())


def _serve(sock: socket.socket, config: Config) -> None:
    header, _ = frames.receive(sock)
    # Before this the runner may give the request to another fork; after it, never.
    sock.sendall(frames.encode({"op": "begun"}))
    signal.alarm(int(header.get("seconds", 60)) + 1)
    operation = str(header["op"])
    try:
        if operation == "tool":
            _tool(sock, header, config)
        else:
            transfer.OPERATIONS[operation](sock, header, config)
    except (OSError, ToolError) as error:
        sock.sendall(frames.encode(transfer.error_header(error)))


def serve(control: socket.socket, config: Config) -> None:
    """Fork for each socket received until the runner closes its end."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    gc.freeze()
    while True:
        data, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if not data:
            return
        with socket.socket(fileno=descriptors[0]) as sock:
            try:
                forked = os.fork()
            except OSError:
                sock.sendall(frames.encode({"op": "error", "code": "limit_pids", "message": "no more processes"}))
                continue
            if forked == 0:
                control.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                os.setsid()
                status = 1
                try:
                    _serve(sock, config)
                    status = 0
                finally:
                    # Whatever happened, a fork never returns into the loop of its parent.
                    os._exit(status)


def main(control_fd: int, config_json: str) -> None:
    """Entry of the process; `control_fd` is a socket to the runner."""
    os.umask(0o022)
    if sys.platform == "linux":
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("500")
    config = Config.from_json(config_json)
    if os.path.isdir(config.workspace):
        os.chdir(config.workspace)
    serve(socket.socket(fileno=control_fd), config)
