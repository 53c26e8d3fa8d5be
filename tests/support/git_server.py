"""A git host: bare repositories behind HTTPS and passwords, served by git's own CGI program, under the name of another host."""

import base64
import os
import shutil
import ssl
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import cast

from managed_agents.egress import authority

HOST = "github.com"
GIT: dict[str, str] = {
    "PATH": os.environ["PATH"],
    "HOME": "/nonexistent",
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_AUTHOR_NAME": "a",
    "GIT_AUTHOR_EMAIL": "a@example.com",
    "GIT_COMMITTER_NAME": "a",
    "GIT_COMMITTER_EMAIL": "a@example.com",
}


def git(*arguments: str, at: Path) -> str:
    """Run git on this machine."""
    done = subprocess.run(["git", *arguments], cwd=at, env=GIT, capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.strip()


@dataclass
class GitHost:
    """`tokens` are what each private repository takes; a status in `answers` is the answer to everything about one."""

    root: Path
    port: int
    ca: Path
    tokens: dict[str, set[str]] = field(default_factory=dict[str, set[str]])
    answers: dict[str, int] = field(default_factory=dict[str, int])
    seen: list[tuple[str, str | None]] = field(default_factory=list[tuple[str, str | None]])
    """Path and token of each request."""
    sent: dict[str, int] = field(default_factory=dict[str, int])
    """Bytes of objects and names that were sent of each repository."""

    @property
    def settings(self) -> dict[str, object]:
        """What makes a server take this for the host of that name."""
        return {
            "egress_routes": f"{HOST}:443=127.0.0.1:{self.port}",
            "egress_allowed_networks": "127.0.0.0/8",
            "extra_ca": self.ca,
        }

    def repository(self, name: str, *, tokens: set[str] | None = None, files: dict[str, str] | None = None) -> Path:
        """Make `owner/repo` with a commit on `main` and one on `feature`; private when it has tokens."""
        bare, work = self.root / f"{name}.git", self.root / "work" / name
        work.mkdir(parents=True)
        bare.parent.mkdir(parents=True, exist_ok=True)
        git("init", "-q", "--bare", "-b", "main", str(bare), at=self.root)
        git("config", "http.receivepack", "true", at=bare)
        git("config", "uploadpack.allowReachableSHA1InWant", "true", at=bare)
        git("init", "-q", "-b", "main", at=work)
        git("remote", "add", "origin", str(bare), at=work)
        for path, content in (files or {"README.md": f"{name}\n"}).items():
            (work / path).parent.mkdir(parents=True, exist_ok=True)
            (work / path).write_text(content)
        git("add", "-A", at=work)
        git("commit", "-qm", "first", at=work)
        git("checkout", "-qb", "feature", at=work)
        git("commit", "-qm", "on the branch", "--allow-empty", at=work)
        git("push", "-q", "origin", "main", "feature", at=work)
        if tokens is not None:
            self.tokens[name] = tokens
        return bare

    def head(self, name: str, ref: str = "main") -> str:
        return git("rev-parse", ref, at=self.root / f"{name}.git")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        return

    def do_GET(self) -> None:
        self._serve(b"")

    def do_POST(self) -> None:
        self._serve(self._body())

    def _body(self) -> bytes:
        if self.headers.get("transfer-encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("content-length") or 0))
        parts: list[bytes] = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _token(self) -> str | None:
        scheme, _, value = self.headers.get("authorization", "").partition(" ")
        return base64.b64decode(value).decode().partition(":")[2] if scheme == "Basic" else None

    def _end(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {**headers, "content-length": str(len(body))}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def _serve(self, body: bytes) -> None:
        host = cast("_Server", self.server).host
        path, _, query = self.path.partition("?")
        owner, repository, *rest = path.strip("/").split("/")
        name = f"{owner}/{repository.removesuffix('.git')}"
        token = self._token()
        host.seen.append((path, token))
        assert self.headers["host"] == HOST
        if name in host.answers:
            return self._end(host.answers[name])
        if name in host.tokens and token not in host.tokens[name]:
            return self._end(401, www_authenticate='Basic realm="git"')
        if not (host.root / f"{name}.git").is_dir():
            return self._end(404, b"Not Found")
        environment = {
            **GIT,
            "GIT_PROJECT_ROOT": str(host.root),
            "GIT_HTTP_EXPORT_ALL": "1",
            "PATH_INFO": f"/{name}.git/{'/'.join(rest)}",
            "QUERY_STRING": query,
            "REQUEST_METHOD": self.command,
            "CONTENT_TYPE": self.headers.get("content-type", ""),
            "HTTP_CONTENT_ENCODING": self.headers.get("content-encoding", ""),
            "GIT_PROTOCOL": self.headers.get("git-protocol", ""),
            "REMOTE_USER": "token",
            "CONTENT_LENGTH": str(len(body)),
        }
        done = subprocess.run(["git", "http-backend"], input=body, env=environment, capture_output=True, timeout=60, check=False)
        head, _, answer = done.stdout.partition(b"\r\n\r\n")
        headers = dict(line.split(": ", 1) for line in head.decode().split("\r\n") if line)
        if rest == ["git-upload-pack"]:
            host.sent[name] = host.sent.get(name, 0) + len(answer)
        status = int(headers.pop("Status", "200").split()[0])
        return self._end(status, answer, **headers)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    host: GitHost
    context: ssl.SSLContext

    def finish_request(self, request: object, client_address: object) -> None:
        # In the connection's own thread: a client that hesitates keeps nobody else waiting.
        with suppress(OSError), self.context.wrap_socket(cast("ssl.SSLSocket", request), server_side=True) as wrapped:
            _Handler(wrapped, cast("tuple[str, int]", client_address), self)


@contextmanager
def git_host() -> Iterator[GitHost]:
    """Serve until the block ends."""
    root = Path(tempfile.mkdtemp(prefix="ma-git-"))
    ours = authority.load(root / "authority")
    (root / "ca.pem").write_text(ours.pem)
    server = _Server(("127.0.0.1", 0), _Handler)
    server.context = ours.context(HOST)
    server.host = GitHost(root, server.server_address[1], root / "ca.pem")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server.host
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        shutil.rmtree(root, ignore_errors=True)
