"""Reads docs/requirements: what this server promises, one entry per rule, and where it differs from the hosted service.

Protects against entries that say nothing: every file is checked whole, unknown keys and doubled ids included.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "requirements"
KINDS = ("rule", "difference", "path")
SENTENCE_LENGTH_MAX = 260


class ManifestError(Exception):
    """A file of docs/requirements is not as its README says; the message names the entry."""


@dataclass(frozen=True)
class Requirement:
    """One promise. A `difference` or a `path` that is not served also has the `point` under which readers look for it."""

    id: str
    topic: str
    says: str
    source: str
    kind: str = "rule"
    point: str | None = None


def load(folder: Path = FOLDER) -> dict[str, Requirement]:
    """All entries by id, in the order of the files."""
    found: dict[str, Requirement] = {}
    for path in sorted(folder.glob("*.yaml")):
        for entry in _entries(path):
            if entry.id in found:
                raise ManifestError(f"{path.name}: {entry.id} is there twice")
            found[entry.id] = entry
    return found


def _entries(path: Path) -> Iterator[Requirement]:
    document = yaml.safe_load(path.read_text())
    if not isinstance(document, dict) or set(document) != {"topic", "prefix", "requirements"}:
        raise ManifestError(f"{path.name}: a mapping with topic, prefix and requirements is wanted")
    for raw in document["requirements"]:
        yield _entry(raw, document["topic"], document["prefix"], path.name)


def _entry(raw: dict[str, Any], topic: str, prefix: str, file: str) -> Requirement:
    where = f"{file}: {raw.get('id')}"
    if not set(raw) <= {"id", "says", "source", "kind", "point"}:
        raise ManifestError(f"{where} has unknown keys: {sorted(raw)}")
    try:
        made = Requirement(topic=topic, **raw)
    except TypeError as error:
        raise ManifestError(f"{where}: {error}") from error
    if any(not isinstance(value, str) for value in raw.values()):
        raise ManifestError(f"{where}: every value is text (quote what YAML reads as something else)")
    if not re.fullmatch(rf"{prefix}-\d{{3}}", made.id):
        raise ManifestError(f"{where}: ids of this file are {prefix}- and three digits")
    if made.kind not in KINDS or (made.kind == "rule") != (made.point is None):
        raise ManifestError(f"{where}: kind is one of {KINDS}; all but rules have a point")
    if made.kind == "rule" and not made.says.endswith("."):
        raise ManifestError(f"{where}: a rule is a sentence")
    if len(made.says) > SENTENCE_LENGTH_MAX or "\n" in made.says or not made.source:
        raise ManifestError(f"{where}: one sentence of at most {SENTENCE_LENGTH_MAX} characters, and its source")
    return made


def differences_page(entries: dict[str, Requirement]) -> str:
    """The tables of docs/compatibility.md."""
    lines = ["| Point | Here | Id |", "|---|---|---|"]
    lines += [_row(entry) for entry in entries.values() if entry.kind == "difference"]
    lines += ["", "Paths that are not served answer 404 `not found`:", "", "| Path | Why | Id |", "|---|---|---|"]
    lines += [_row(entry) for entry in entries.values() if entry.kind == "path"]
    return "\n".join(lines)


def _row(entry: Requirement) -> str:
    return f"| {entry.point} | {entry.says} | {entry.id} |"
