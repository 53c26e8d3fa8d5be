"""glob and grep. Runs in a child with the commands' uid."""

from __future__ import annotations

import os
import re
import selectors
import shutil
import stat
import subprocess
import time
from collections.abc import Iterator
from typing import Any

from .config import Config
from .filetools import Block, string, text_block
from .toolerror import ToolError

GLOB_PATHS_MAX = 100  # observed hosted behaviour
GREP_BYTES_MAX = 100 * 1024  # spec: this and the next two, the SDK's reference implementation
GREP_LINE_CHARS_MAX = 2000
WALK_ENTRIES_MAX = 50_000
GREP_FILE_BYTES_MAX = 64 * 1024 * 1024
GREP_SECONDS_MAX = 60.0


def walk(root: str, skip_git: bool = True) -> Iterator[tuple[str, os.stat_result]]:
    """Yield regular files below `root`, links not followed, at most `WALK_ENTRIES_MAX` entries looked at."""
    pending, seen = [root], 0
    while pending:
        directory = pending.pop()
        try:
            entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
        except OSError:
            continue  # unreadable or gone: as `find` does
        directories: list[str] = []
        for entry in entries:
            seen += 1
            if seen > WALK_ENTRIES_MAX:
                return
            try:
                if entry.is_dir(follow_symlinks=False):
                    if not (skip_git and entry.name == ".git"):
                        directories.append(entry.path)
                    continue
                found = entry.stat(follow_symlinks=False)
            except OSError:
                continue  # deleted while we looked
            if stat.S_ISREG(found.st_mode):
                yield entry.path, found
        pending.extend(reversed(directories))


class BadGlob(ValueError):
    """A pattern that means nothing, in ripgrep's words (observed hosted behaviour)."""


def _character_class(pattern: str, start: int) -> tuple[str, int]:
    """The regular expression of the class whose bracket stands at `start`, and where its end is. Raises BadGlob."""
    negated = pattern[start + 1 : start + 2] in ("!", "^")
    first = start + 1 + negated
    # A bracket that comes first stands for itself.
    end = pattern.find("]", first + 1)
    if end < 0:
        raise BadGlob("unclosed character class; missing ']'")
    inner = pattern[first:end]
    for low, high in re.findall(r"(.)-(.)", inner, re.DOTALL):
        if low > high:
            raise BadGlob(f"invalid range; '{low}' > '{high}'")
    escaped = re.sub(r"[\\\[\]^&|~]", r"\\\g<0>", inner)
    return f"[{'^' * negated}{escaped}]", end


def translate(pattern: str) -> str:
    """Return the regular expression of a doublestar pattern, matched against the whole relative path. Raises BadGlob."""
    out, i, depth = "", 0, 0
    while i < len(pattern):
        char = pattern[i]
        if pattern.startswith("**/", i) and (i == 0 or pattern[i - 1] in "/{,"):
            out, i = out + "(?:[^/]+/)*", i + 3
            continue
        if pattern.startswith("**", i):
            out, i = out + ".*", i + 2
            continue
        if char == "*":
            out += "[^/]*"
        elif char == "?":
            out += "[^/]"
        elif char == "[":
            found, i = _character_class(pattern, i)
            out += found
        elif char == "{":
            out, depth = out + "(?:", depth + 1
        elif char == "}" and depth:
            out, depth = out + ")", depth - 1
        elif char == "," and depth:
            out += "|"
        elif char == "\\":
            i += 1
            if i == len(pattern):
                raise BadGlob("dangling '\\'")
            out += re.escape(pattern[i])
        else:
            out += re.escape(char)
        i += 1
    if depth:
        raise BadGlob("unclosed alternate group; missing '}' (maybe escape '{' with '[{]'?)")
    return out


def _split_absolute(pattern: str) -> tuple[str, str]:
    """Split off the leading directories without wildcards."""
    parts = pattern.split("/")
    fixed = 0
    while fixed < len(parts) - 1 and not any(char in parts[fixed] for char in "*?[{\\"):
        fixed += 1
    return "/".join(parts[:fixed]) or "/", "/".join(parts[fixed:])


def glob(arguments: dict[str, Any], config: Config) -> list[Block]:
    """Return paths that match, newest first."""
    asked = pattern = string("glob", arguments, "pattern")
    root = config.resolve(string("glob", arguments, "path") if arguments.get("path") is not None else ".")
    if pattern.startswith("/"):
        root, pattern = _split_absolute(pattern)
        root = config.resolve(root)
    if pattern.startswith("./"):
        pattern = pattern[2:]
    if ".." in pattern.split("/"):
        raise ToolError("glob: '..' is not permitted in the pattern")
    root = os.path.normpath(root)
    if not os.path.isdir(root):
        raise ToolError(f"glob: {root}: no such directory")
    # A pattern without a slash matches names at any depth (observed hosted behaviour).
    if "/" not in pattern:
        pattern = "**/" + pattern
    try:
        matcher = re.compile(translate(pattern), re.DOTALL)
    except (BadGlob, re.error) as error:
        raise ToolError(f"error parsing glob '{asked}': {error}") from error
    start = len(root.rstrip("/")) + 1
    found = [
        (entry.st_mtime_ns, path) for path, entry in walk(root, skip_git=".git" not in pattern) if matcher.fullmatch(path[start:])
    ]
    found.sort(key=lambda item: (-item[0], item[1]))
    return text_block("\n".join(path for _, path in found[:GLOB_PATHS_MAX]) or "No files found")


def _cut(line: bytes) -> str:
    text = line.decode(errors="replace")
    return text if len(text) <= GREP_LINE_CHARS_MAX else text[:GREP_LINE_CHARS_MAX] + " [line cut]"


class _Matches:
    """Result lines up to the bound."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.size = 0
        self.full = False

    def add(self, line: bytes) -> bool:
        text = _cut(line)
        self.size += len(text.encode(errors="replace")) + 1
        if self.size > GREP_BYTES_MAX:
            self.full = True
            return False
        self.lines.append(text)
        return True

    def content(self, note: str = "") -> list[Block]:
        if self.full:
            note = f"[output cut at {GREP_BYTES_MAX} bytes]"
        text = "\n".join([*self.lines, *([note] if note else [])])
        return text_block(text or "No matches found")


def _ripgrep(program: str, pattern: str, root: str) -> list[Block]:
    command = [program, "--no-config", "--line-number", "--with-filename", "--no-heading", "--color=never"]
    command += [
        "--hidden",
        "--no-ignore",
        "--glob=!.git",
        "--no-messages",
        "--sort=path",
        "-e",
        pattern,
        "--",
        root,
    ]
    matches, pending, deadline = _Matches(), b"", time.monotonic() + GREP_SECONDS_MAX
    with (
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process,
        selectors.DefaultSelector() as ready,
    ):
        assert process.stdout is not None
        assert process.stderr is not None
        ready.register(process.stdout, selectors.EVENT_READ)
        while True:
            if not ready.select(max(0.0, deadline - time.monotonic())):
                process.kill()
                return matches.content(f"[stopped after {GREP_SECONDS_MAX:.0f} s]")
            chunk = os.read(process.stdout.fileno(), 65536)
            *complete, pending = (pending + chunk).split(b"\n")
            # A line without end must not fill the memory: what exceeds the bound is cut from the display
            # anyway.
            pending = pending[: 8 * GREP_LINE_CHARS_MAX]
            if not all(matches.add(line) for line in complete):
                process.kill()
                return matches.content()
            if not chunk:
                break
        message = process.stderr.read(4096).decode(errors="replace").strip()
    if process.returncode == 2 and message and not matches.lines:
        raise ToolError(f"grep: {message}")
    return matches.content()


def _python(pattern: str, root: str) -> list[Block]:
    try:
        matcher = re.compile(pattern.encode())
    except re.error as error:
        raise ToolError(f"grep: invalid regex: {error}") from error
    matches = _Matches()
    deadline = time.monotonic() + GREP_SECONDS_MAX
    files = [root] if os.path.isfile(root) else (path for path, _ in walk(root))
    for path in files:
        if time.monotonic() > deadline:
            return matches.content(f"[stopped after {GREP_SECONDS_MAX:.0f} s]")
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            with os.fdopen(fd, "rb") as file:
                data = file.read(GREP_FILE_BYTES_MAX)
        except OSError:
            continue  # unreadable or gone, as ripgrep with --no-messages
        if b"\0" in data[:8192]:
            continue
        for number, line in enumerate(data.split(b"\n"), 1):
            if matcher.search(line) and not matches.add(os.fsencode(path) + b":%d:" % number + line):
                return matches.content()
    return matches.content()


def grep(arguments: dict[str, Any], config: Config) -> list[Block]:
    """Return `path:line:text` of every line that matches a regular expression."""
    pattern = string("grep", arguments, "pattern")
    root = config.resolve(string("grep", arguments, "path") if arguments.get("path") is not None else ".")
    root = os.path.normpath(root)
    if not os.path.exists(root):
        raise ToolError(f"grep: {root}: no such file or directory")
    program = shutil.which("rg", path=config.environment.get("PATH"))
    return _ripgrep(program, pattern, root) if program else _python(pattern, root)
