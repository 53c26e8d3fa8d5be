"""Pure parts of the runner, and what it promises about itself."""

import ast
import re
import socket
import sys
from pathlib import Path

import pytest

from managed_agents.sandbox import image, runner
from managed_agents.sandbox.docker import split_key
from managed_agents.sandbox.layout import runner_config
from managed_agents.sandbox.runner import frames
from managed_agents.sandbox.runner.config import Config
from managed_agents.sandbox.runner.filetools import render_notebook
from managed_agents.sandbox.runner.search import translate

SOURCES = sorted(Path(runner.__file__).parent.glob("*.py"))


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_the_runner_is_python_3_9_and_imports_only_the_standard_library(source: Path) -> None:
    tree = ast.parse(source.read_text(), feature_version=(3, 9))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        else:
            continue
        for name in names:
            assert name.split(".")[0] in sys.stdlib_module_names


@pytest.mark.parametrize(
    ("pattern", "matching", "other"),
    [
        ("**/*.py", ["a.py", "b/c/a.py"], ["a.pyc", "b/c"]),
        ("src/*.py", ["src/a.py"], ["src/b/a.py", "a.py"]),
        ("src/**", ["src/a", "src/b/c"], ["src2/a"]),
        ("*.{js,ts}", ["a.js", "b.ts"], ["a.jsx", "d/a.js"]),
        ("a/**/b", ["a/b", "a/x/y/b"], ["ab"]),
        ("[!a]?.t[xy]", ["bc.tx"], ["ac.tx", "b.tx"]),
        (r"\*", ["*"], ["x"]),
    ],
)
def test_doublestar_patterns(pattern: str, matching: list[str], other: list[str]) -> None:
    matcher = re.compile(translate(pattern))
    assert [name for name in matching if not matcher.fullmatch(name)] == []
    assert [name for name in other if matcher.fullmatch(name)] == []


def test_a_message_survives_splitting() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        body = bytes(range(256)) * 256
        frames.send_message(ours, {"op": "x", "stream": 7}, body)
        header, received = frames.receive(theirs)
    assert (header["op"], header["stream"], received) == ("x", 7, body)
    pieces = list(frames.split({"op": "x", "stream": 7}, b"z" * (2 * frames.CHUNK_BYTES + 1)))
    assert [header.get("more", False) for header, _ in pieces] == [True, True, False]
    assert [header["op"] for header, _ in pieces] == ["x", "data", "data"]


@pytest.mark.parametrize("prefix", [b"\xff" * 8, b"\x00\x00\x00\x02\x7f\xff\xff\xff"])
def test_oversized_frames_are_refused(prefix: bytes) -> None:
    with pytest.raises(frames.FrameError):
        frames.lengths(prefix)


@pytest.mark.parametrize("raw", [b"", b"[]", b"{", b"5"])
def test_headers_are_objects(raw: bytes) -> None:
    with pytest.raises(frames.FrameError):
        frames.decode_header(raw)


def test_configuration_survives_its_json() -> None:
    config = runner_config(socket="/s", state="/t", uid=64000, environment={"HOME": "/h"})
    assert Config.from_json(config.to_json()) == config


def test_mapped_paths_are_whole_components() -> None:
    config = Config("/s", "/t", None, "/d/workspace", "/x", {}, False, mapped={"/workspace": "/d/workspace"})
    assert config.resolve("/workspace/a") == "/d/workspace/a"
    assert config.resolve("/workspaces/a") == "/workspaces/a"
    assert config.resolve("a") == "/d/workspace/a"


def test_notebook_rendering_shows_sources_and_outputs() -> None:
    raw = b'{"cells": [{"cell_type": "markdown", "source": "# T"}, {"cell_type": "code", "source": ["1+", "1"],'
    raw += b'"outputs": [{"data": {"text/plain": ["2"], "image/png": "x"}}]}]}'
    rendered = render_notebook(raw)
    assert "# T" in rendered
    assert "1+1" in rendered
    assert "# Output of cell 2\n2" in rendered
    assert "image/png" in rendered


def test_directory_names_are_read_back() -> None:
    assert split_key("sbx_1.12") == ("sbx_1", 12)
    assert split_key("partial") is None
    assert split_key(".1") is None


def test_the_image_key_depends_on_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    before = image.content_key()
    monkeypatch.setattr(image, "PACKAGES", (*image.PACKAGES, "one-more"))
    assert image.content_key() != before
