"""Every requirement has a test, every id that a test carries is a requirement, and the manifest itself is sound."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.requirements_manifest import FOLDER, ManifestError, load
from tests.docs.pages import ROOT

TESTS = ROOT / "tests"


def _marks(tree: ast.AST) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.requirement":
            yield node


def _placed(tree: ast.Module) -> set[ast.AST]:
    """Calls that pytest sees: decorators of tests, `pytestmark`, and `marks` of a parameter set."""
    seen: list[ast.expr] = []
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                seen += node.decorator_list if name.lower().startswith("test") else []
            case ast.Assign(targets=[ast.Name(id="pytestmark")]):
                seen.append(node.value)
            case ast.keyword(arg="marks"):
                seen.append(node.value)
            case _:
                pass
    return {found for expression in seen for found in ast.walk(expression)}


def _ids_in_tests() -> dict[str, set[str]]:
    """Ids, and the files that carry each."""
    carried: dict[str, set[str]] = {}
    for path in sorted(TESTS.rglob("test_*.py")):
        tree = ast.parse(path.read_text())
        placed = _placed(tree)
        for mark in _marks(tree):
            where = f"{path.relative_to(ROOT)}:{mark.lineno}"
            assert mark in placed, f"{where} marks no test"
            assert mark.args, f"{where} names no requirement"
            for argument in mark.args:
                assert isinstance(argument, ast.Constant), f"{where}: ids are written out, so that a search finds them"
                carried.setdefault(str(argument.value), set()).add(str(path.relative_to(ROOT)))
    return carried


def test_every_requirement_has_a_test() -> None:
    carried = _ids_in_tests()
    assert [id_ for id_ in load() if id_ not in carried] == []


def test_every_id_in_a_test_is_a_requirement() -> None:
    known = load()
    assert {id_: files for id_, files in _ids_in_tests().items() if id_ not in known} == {}


def test_every_file_of_the_manifest_has_entries() -> None:
    topics = {entry.topic for entry in load().values()}
    assert len(topics) == len(list(FOLDER.glob("*.yaml"))) >= 6


def test_every_refusal_by_name_is_proven_on_its_own() -> None:
    """A test of many refusals would not notice that one of them became served."""
    refused = [entry.id for entry in load().values() if entry.kind == "difference" and entry.says == "refused by name"]
    carried = _ids_in_tests()
    assert [id_ for id_ in refused if "tests/conformance/test_refused_by_name.py" not in carried[id_]] == []


GOOD = "{id: ABC-001, says: It works., source: ours}"


@pytest.mark.parametrize(
    ("entries", "wrong"),
    [
        (f"[{GOOD}, {GOOD}]", "twice"),
        ("[{id: XYZ-001, says: It works., source: ours}]", "ABC-"),
        ("[{id: ABC-001, says: It works.}]", "source"),
        ("[{id: ABC-001, says: It works., source: ours, test: x}]", "unknown keys"),
        ("[{id: ABC-001, says: It works, source: ours}]", "sentence"),
        ("[{id: ABC-001, says: It works., source: ours, kind: wish}]", "kind"),
        ("[{id: ABC-001, says: refused, source: ours, kind: difference}]", "point"),
        (f"[{{id: ABC-001, says: {'It works ' * 40}., source: ours}}]", "one sentence"),
    ],
)
def test_unsound_entries_are_found(tmp_path: Path, entries: str, wrong: str) -> None:
    (tmp_path / "abc.yaml").write_text(f"topic: abc\nprefix: ABC\nrequirements: {entries}\n")
    with pytest.raises(ManifestError, match=wrong):
        load(tmp_path)
