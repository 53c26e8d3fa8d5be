"""What a sandbox must not reach: the runner, other sessions, the host and its networks."""

import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import anyio
import pytest

from managed_agents.sandbox import layout
from managed_agents.sandbox.backend import CallUnknown, Sandbox
from tests.hostile.conftest import Run, Say
from tests.integration.sandbox.contract import Bench, new_call, text

pytestmark = [pytest.mark.anyio, pytest.mark.docker]


@pytest.mark.requirement("ENV-047")
async def test_the_runner_cannot_be_read(say: Say, attacker: Sandbox) -> None:
    call = new_call("bash", command="echo outcome-of-mine")
    await attacker.execute(call)
    said = await say("""
        for pid in 1 $(pgrep -f 'runner import main'); do
          for what in environ mem maps auxv stack syscall fd/0 cwd root exe map_files; do
            head -c 100 /proc/$pid/$what >/dev/null 2>/tmp/why && echo "READ $pid/$what"; ls /proc/$pid/fd 2>/dev/null
          done
          python3 - $pid <<'END'
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
pid = int(sys.argv[1])
calls = {"attach": (101, 16, pid), "seize": (101, 0x4206, pid), "readv": (310, pid), "getfd": (438, 3, 0, 0)}
for name, numbers in calls.items():
    if libc.syscall(*numbers, 0, 0, 0) != -1: print("ALLOWED", name)
try:
    fd = os.pidfd_open(pid)
    if libc.syscall(438, fd, 5, 0) != -1: print("ALLOWED pidfd_getfd")
except OSError: pass
END
        done
        ls /run/managed-agents/state /run/managed-agents/socket 2>&1 | grep -c denied; echo END
    """)
    assert "READ" not in said
    assert "ALLOWED" not in said
    assert said.endswith("2\nEND\n")
    assert text(await attacker.collect(call.tool_use_id, 1)) == "outcome-of-mine\n"


async def test_the_runners_socket_takes_no_commands_connection(say: Say) -> None:
    said = await say("""python3 - <<'END'
import os, socket
for path in ("/run/managed-agents/socket/runner.sock", "/proc/1/root/run/managed-agents/socket/runner.sock"):
    try: socket.socket(socket.AF_UNIX).connect(path); print("CONNECTED")
    except OSError as error: print(type(error).__name__)
print(open("/proc/net/unix").read().count("runner.sock"))
END""")
    assert "CONNECTED" not in said
    assert said.startswith("PermissionError\n")


async def test_the_runners_configuration_holds_no_secret(say: Say, bench: Bench) -> None:
    """Its arguments are readable for everybody inside; the commands' environment is made from nothing."""
    said = await say("cat /proc/*/cmdline 2>/dev/null | tr '\\0' '\\n'; env")
    for secret in ("KEY", "TOKEN", "SECRET", "PASSWORD", "postgres", str(bench.directory)):
        assert secret not in said


async def test_another_session_is_not_there(say: Say, neighbour: Sandbox, attacker: Sandbox) -> None:
    said = await say(
        "grep -rsl neighbours-file /workspace /home /tmp /mnt /run /proc/*/root/workspace 2>/dev/null; "
        "pgrep -fa 'sleep 1000'; cat /proc/mounts; find / -name '*sbx_neighbour*' 2>/dev/null; ls /dev/shm /dev/mqueue; ipcs -m"
    )
    assert "sbx_neighbour" not in said
    assert "neighbours-file" not in said
    assert "sleep 1000" not in said
    with pytest.raises(CallUnknown):
        await attacker.collect("kept", 1)
    assert neighbour.id != attacker.id


async def test_sessions_have_uids_and_directories_of_their_own(bench: Bench, say: Say, neighbour: Sandbox) -> None:
    theirs = text(await neighbour.execute(call := new_call("bash", command="id -u")))
    await neighbour.ack(call.tool_use_id)
    assert await say("id -u") != theirs
    for name in ("sbx_attacker", "sbx_neighbour"):
        places = layout.places(bench.directory / "data", bench.directory / "run", name, 1)
        assert places.state.stat().st_mode & 0o777 == 0o700
        assert places.run.stat().st_mode & 0o007 == 0


@pytest.fixture
def host_ports() -> Iterator[dict[str, int]]:
    """Servers of the host: on loopback, on every address, on an abstract unix socket."""
    with ExitStack() as stack:
        ports: dict[str, int] = {}
        for address in ("127.0.0.1", "0.0.0.0"):
            listener = stack.enter_context(socket.create_server((address, 0)))
            ports[address] = listener.getsockname()[1]
        abstract = stack.enter_context(socket.socket(socket.AF_UNIX))
        abstract.bind("\0managed-agents-hostile-test")
        abstract.listen()
        yield ports


def _addresses() -> list[str]:
    """Every address of this host."""
    found = {"127.0.0.1", "172.17.0.1", "169.254.169.254", "10.0.0.1", "192.168.0.1", "8.8.8.8", "::1", "fe80::1"}
    found |= {str(entry[4][0]) for entry in socket.getaddrinfo(socket.gethostname(), None)}
    return sorted(found)


@pytest.mark.requirement("ENV-043")
async def test_no_network_leads_anywhere(say: Say, host_ports: dict[str, int]) -> None:
    said = await say(f"""python3 - <<'END'
import socket, struct
ports = {sorted({*host_ports.values(), 22, 53, 80, 443, 2375, 5432})}
for address in {_addresses()}:
    for port in ports:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            with socket.socket(family, kind) as s:
                s.settimeout(0.3)
                try:
                    s.connect((address, port)); s.send(b"x"); s.recv(1); print("REACHED", address, port, kind)
                except OSError: pass
for name in ("host.docker.internal", "metadata.google.internal", "example.com", "gateway.docker.internal"):
    try: print("RESOLVED", socket.getaddrinfo(name, 80))
    except OSError: pass
for path in ("\\0managed-agents-hostile-test", "/var/run/docker.sock", "/run/docker.sock"):
    try: socket.socket(socket.AF_UNIX).connect(path); print("REACHED", path)
    except OSError: pass
for family, kind, protocol in ((17, 3, 0x0300), (2, 3, 1), (16, 3, 0), (38, 5, 0), (40, 1, 0)):
    try: s = socket.socket(family, kind, protocol)
    except OSError: continue
    if family != 16: print("SOCKET", family)
print(sorted(name for _, name in socket.if_nameindex()))
END""")
    assert said == "['lo']\n"


async def test_the_egress_socket_reaches_only_who_listens_for_this_sandbox(say: Say, bench: Bench) -> None:
    """The gateway's side is what the test plays: a sandbox reaches its own socket and nobody else's, and cannot replace it."""
    heard: list[bytes] = []
    places = layout.places(bench.directory / "data", bench.directory / "run", "sbx_attacker", 1)
    path = str(places.egress / layout.EGRESS_SOCKET)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        Path(path).chmod(0o666)
        listener.listen()

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                heard.append(connection.recv(1000))
                connection.sendall(b"HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\n\r\n")

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        said = await say(
            "curl -s -o /dev/null -w '%{http_code}\\n' --max-time 5 http://169.254.169.254/latest/meta-data/; "
            "cd /run/managed-agents/egress && rm -f egress.sock; mv egress.sock x; touch y; ls; cd /workspace"
        )
        await anyio.to_thread.run_sync(thread.join, 10)
    Path(path).unlink()
    assert said.startswith("403\n")
    assert said.rstrip().endswith("egress.sock")
    assert said.count("Read-only file system") + said.count("Permission denied") >= 3
    assert heard[0].startswith(b"GET http://169.254.169.254/latest/meta-data/ HTTP/1.1\r\n")


async def test_the_proxys_port_may_be_taken_only_from_oneself(run: Run, say: Say) -> None:
    """A command may stop using the proxy's port; nothing else listens, and the host's loopback is another one."""
    said = await say("python3 -c 'import socket; socket.create_server((\"127.0.0.1\", 3128))' 2>&1 | tail -1; true")
    assert "Address already in use" in said
    assert not (await run("glob", pattern="*")).is_error
