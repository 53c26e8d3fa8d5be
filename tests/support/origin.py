"""Web server for clients of many kinds: files, a Python index, npm packages, a Go module, crates, a git repository.

It serves `hello` in every way there is. On the host `lent.test` everything needs the token that the gateway is to write.
"""

import gzip
import hashlib
import io
import json
import ssl
import subprocess
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from managed_agents.egress.authority import Authority

HELLO = "hello-from-the-origin"
TOKEN = "Bearer s3cret"
PLAIN, TUNNELLED, LENT = "plain.test", "tunnelled.test", "lent.test"


@dataclass(frozen=True)
class Origin:
    """Where it listens."""

    http_port: int
    https_port: int

    def url(self, host: str) -> str:
        return f"http://{host}:{self.http_port}" if host == PLAIN else f"https://{host}:{self.https_port}"


@contextmanager
def origin(world: Authority, directory: Path) -> Iterator[Origin]:
    """Serve on loopback, once in the clear and once inside TLS; `world` makes the certificates."""
    repository = directory / "git" / "repo.git"
    _git("init", "-q", "--bare", "-b", "main", str(repository))
    _git("-C", str(repository), "config", "http.receivepack", "true")
    files = {
        "hello.txt": HELLO,
        "Cargo.toml": '[package]\nname = "made"\nversion = "1.0.0"\n',
        "src/lib.rs": f"// {HELLO}\n",
    }
    _commit(directory / "work", repository, files)

    class Handler(_Handler):
        root = directory

    plain, inside = (ThreadingHTTPServer(("127.0.0.1", 0), Handler) for _ in range(2))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)

    def named(connection: ssl.SSLSocket, name: str | None, _: ssl.SSLContext) -> None:
        if name is not None:
            connection.context = world.context(name)

    context.sni_callback = named  # type: ignore[assignment]
    inside.socket = context.wrap_socket(inside.socket, server_side=True, do_handshake_on_connect=False)
    for one in (plain, inside):
        one.daemon_threads = True
        threading.Thread(target=one.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield Origin(plain.server_port, inside.server_port)
    finally:
        for one in (plain, inside):
            one.shutdown()
            one.server_close()


def _git(*arguments: str) -> None:
    who = ("-c", "user.name=t", "-c", "user.email=t@example.test", "-c", "commit.gpgsign=false")
    subprocess.run(("git", *who, *arguments), check=True, capture_output=True, timeout=60)


def _commit(work: Path, repository: Path, files: dict[str, str]) -> None:
    _git("init", "-q", "-b", "main", str(work))
    for name, content in files.items():
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_text(content)
    _git("-C", str(work), "add", "-A")
    _git("-C", str(work), "commit", "-q", "-m", "first")
    _git("-C", str(work), "push", "-q", str(repository), "main")


def _wheel() -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("made.py", f'HELLO = "{HELLO}"\n')
        archive.writestr("made-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: made\nVersion: 1.0\n")
        archive.writestr("made-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("made-1.0.dist-info/RECORD", "")
    return made.getvalue()


def _tarball(files: dict[str, str]) -> bytes:
    made = io.BytesIO()
    with gzip.GzipFile(fileobj=made, mode="wb", mtime=0) as packed, tarfile.open(fileobj=packed, mode="w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content.encode())
            archive.addfile(entry, io.BytesIO(content.encode()))
    return made.getvalue()


_NPM = _tarball(
    {"package/package.json": '{"name":"made","version":"1.0.0"}', "package/index.js": f"module.exports = '{HELLO}'\n"}
)


def _module() -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("made.test/hello@v1.0.0/go.mod", "module made.test/hello\n")
        archive.writestr("made.test/hello@v1.0.0/hello.go", f'package hello\n\nconst Hello = "{HELLO}"\n')
    return made.getvalue()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 30
    root: Path

    def do_GET(self) -> None:
        host, url = str(self.headers["host"]), self.path
        if host.startswith(LENT) and self.headers["authorization"] != TOKEN:
            return self._answer(401, b"no token\n")
        if url.startswith("/git/"):
            return self._git()
        scheme = "https" if isinstance(self.connection, ssl.SSLSocket) else "http"
        npm = {
            "name": "made",
            "dist-tags": {"latest": "1.0.0"},
            "versions": {
                "1.0.0": {
                    "name": "made",
                    "version": "1.0.0",
                    "dist": {"tarball": f"{scheme}://{host}/made.tgz", "shasum": hashlib.sha1(_NPM).hexdigest()},
                }
            },
        }
        files: dict[str, bytes] = {
            "/x": HELLO.encode(),
            "/simple/made/": b'<a href="/made-1.0-py3-none-any.whl">made-1.0-py3-none-any.whl</a>',
            "/made-1.0-py3-none-any.whl": _wheel(),
            "/npm/made": json.dumps(npm).encode(),
            "/made.tgz": _NPM,
            "/go/made.test/hello/@v/list": b"v1.0.0\n",
            "/go/made.test/hello/@v/v1.0.0.info": b'{"Version":"v1.0.0","Time":"2026-01-01T00:00:00Z"}',
            "/go/made.test/hello/@v/v1.0.0.mod": b"module made.test/hello\n",
            "/go/made.test/hello/@v/v1.0.0.zip": _module(),
        }
        found = files.get(url.partition("?")[0])
        return self._answer(404, b"nothing here\n") if found is None else self._answer(200, found)

    do_POST = do_GET

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        shown = status != 200 or self.path == "/x" or self.path.endswith("/")
        self.send_header("content-type", "text/html" if shown else "application/octet-stream")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _git(self) -> None:
        """As a web server runs `git http-backend`."""
        path, _, query = self.path.removeprefix("/git").partition("?")
        headers = self.headers
        body = self._chunks() if headers["transfer-encoding"] else self.rfile.read(int(headers["content-length"] or 0))
        variables = {
            "PATH": "/usr/bin:/bin:/usr/local/bin",
            "GIT_PROJECT_ROOT": str(self.root / "git"),
            "GIT_HTTP_EXPORT_ALL": "1",
            "PATH_INFO": path,
            "QUERY_STRING": query,
            "REQUEST_METHOD": self.command,
            "CONTENT_TYPE": headers["content-type"] or "",
            "CONTENT_LENGTH": str(len(body)),
            "HTTP_CONTENT_ENCODING": headers["content-encoding"] or "",
            "GIT_PROTOCOL": headers["git-protocol"] or "",
            "REMOTE_USER": "someone",
            "GIT_CONFIG_COUNT": "1",
            "GIT_CONFIG_KEY_0": "safe.directory",
            "GIT_CONFIG_VALUE_0": "*",
        }
        done = subprocess.run(("git", "http-backend"), input=body, env=variables, capture_output=True, timeout=60)
        head, _, content = done.stdout.partition(b"\r\n\r\n")
        fields = [line.partition(": ") for line in head.decode().split("\r\n") if line]
        status = next((int(value.split()[0]) for name, _, value in fields if name == "Status"), 200)
        self.send_response(status)
        for name, _, value in fields:
            if name != "Status":
                self.send_header(name, value)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Silence."""
