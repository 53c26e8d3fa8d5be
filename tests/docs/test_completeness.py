"""What exists is documented: settings, commands, endpoints, events, errors. Read from the code, so that nothing is forgotten."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import click
from fastapi.routing import APIRoute

from managed_agents.api.app import ROUTERS
from managed_agents.cli.main import COMMANDS, main
from managed_agents.core.settings import Settings
from managed_agents.eventlog.events import PERSISTED_TYPES
from tests.docs.pages import API, ERRORS_PAGE, EVENTS_PAGE, EXAMPLE_PAGES, README, RUNNING_PAGE, SETTINGS_PAGE, SOURCE, examples

README_LINES_MAX = 120
NOT_EMITTED = "## Not emitted yet"


def _missing(names: Iterator[str] | set[str], page: Path, text: str | None = None) -> list[str]:
    text = page.read_text() if text is None else text
    return [name for name in sorted(set(names)) if f"`{name}`" not in text]


def _strings(folders: tuple[str, ...]) -> Iterator[str]:
    """String constants of the code; sets of known names (`PERSISTED_TYPES`, `EVENTS` …) are not uses of them."""
    for folder in folders:
        for file in sorted((SOURCE / folder).rglob("*.py")):
            tree = ast.parse(file.read_text())
            listed = {
                id(constant)
                for call in ast.walk(tree)
                if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "frozenset"
                for constant in ast.walk(call)
            }
            for node in ast.walk(tree):
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in listed:
                    yield node.value


def test_settings() -> None:
    assert _missing({f"MANAGED_AGENTS_{name.upper()}" for name in Settings.model_fields}, SETTINGS_PAGE) == []


def test_commands() -> None:
    commands: set[str] = set()
    context = click.Context(main)
    for name in COMMANDS:
        command = main.get_command(context, name)
        parts = list(command.commands) if isinstance(command, click.Group) else []
        commands |= {f"managed-agents {name} {part}" for part in parts} or {f"managed-agents {name}"}
    assert _missing(commands, RUNNING_PAGE) == []


def test_endpoints() -> None:
    pages = "".join(page.read_text() for page in (*sorted(API.glob("*.md")), RUNNING_PAGE))
    served = {
        f"{method} {re.sub(r'{[^}]*_id}', '{id}', route.path, count=1)}"
        for router in ROUTERS
        for route in router.routes
        if isinstance(route, APIRoute)
        for method in route.methods
    }
    assert _missing(served, RUNNING_PAGE, pages) == []


def _curls() -> set[str]:
    """Requests that the examples make with curl, as `METHOD /v1/path/{}`."""
    made: set[str] = set()
    for page in EXAMPLE_PAGES:
        for example in examples(page):
            for command in re.findall(r"\bcurl -.*", example.code.replace("\\\n", " ")):
                url = re.search(r'"?\$BASE_URL(/v1/[^"?\s]*)', command)
                method = re.search(r"-X (\w+)", command)
                sends = re.search(r" -[dF] ", command) and " -G " not in command
                path = re.sub(r"\$\w+|(?<=/)[a-z]+_01\w+", "{}", url[1] if url else "")
                made.add(f"{method[1] if method else 'POST' if sends else 'GET'} {path}")
    return made


def test_the_examples_of_every_page_about_the_api_are_run() -> None:
    assert set(API.glob("*.md")) <= set(EXAMPLE_PAGES)


def test_every_endpoint_is_shown_with_curl() -> None:
    served = {
        f"{method} {re.sub(r'{[^}]*}', '{}', route.path)}"
        for router in ROUTERS
        for route in router.routes
        if isinstance(route, APIRoute) and route.path.startswith("/v1/")
        for method in route.methods
    }
    assert sorted(served - _curls()) == []


def test_event_types() -> None:
    text = EVENTS_PAGE.read_text()
    emitted_text, _, not_emitted_text = text.partition(NOT_EMITTED)
    # Classes of request bodies name what clients may send; that is documented in the same table.
    used = {value for value in _strings(("eventlog", "harness", "resources/sessions")) if value in PERSISTED_TYPES}
    assert len(used) > 15
    assert _missing(used, EVENTS_PAGE, emitted_text) == []
    assert _missing(set(PERSISTED_TYPES) - used, EVENTS_PAGE, not_emitted_text) == []
    assert [name for name in sorted(used) if f"`{name}`" in not_emitted_text] == []
    assert "`session.deleted`" in emitted_text  # in streams only, so it is not among the persisted ones
    assert "`ping`" in emitted_text


def test_types_of_session_errors() -> None:
    used = {value for value in _strings(("eventlog", "harness")) if re.fullmatch(r"[a-z_]+_error", value)} - {"is_error"}
    assert len(used) >= 6
    assert _missing(used, EVENTS_PAGE) == []


def test_error_types_and_codes_of_answers() -> None:
    names: set[str] = set()
    for file in SOURCE.rglob("*.py"):
        tree = ast.parse(file.read_text())
        constants = {
            target.id: node.value.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and node.arg == "error_code":
                if isinstance(node.value, ast.Constant) and node.value.value is not None:
                    names.add(node.value.value)
                elif isinstance(node.value, ast.Name) and isinstance(constants.get(node.value.id), str):
                    names.add(constants[node.value.id])
    types = {value for value in _strings(("core", "web")) if re.fullmatch(r"[a-z_]+_error|request_too_large", value)}
    assert len(names) > 5
    assert len(types) > 5
    assert _missing(names | types, ERRORS_PAGE) == []


def test_the_readme_is_one_page() -> None:
    assert len(README.read_text().splitlines()) <= README_LINES_MAX
