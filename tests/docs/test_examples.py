"""The examples of README and docs/api, run in order against a server, with a reader's tools: curl and the SDK."""

from pathlib import Path

import pytest
from anthropic import Anthropic

from tests.docs.conftest import Running
from tests.docs.pages import EVENTS_PAGE, EXAMPLE_PAGES, ROOT, examples
from tests.docs.readers import Answer, reader

pytestmark = pytest.mark.timeout(400)


@pytest.mark.parametrize("page", EXAMPLE_PAGES, ids=lambda page: page.name)
def test_examples_work_as_they_stand(page: Path, server: Running, tmp_path: Path) -> None:
    found = examples(page)
    assert {example.language for example in found} == {"bash", "python"}, "a page shows both curl and the SDK"
    with reader(server.environment, tmp_path) as interpreters:
        for example in found:
            answer = interpreters[example.language].paste(example)
            where = f"{page.relative_to(ROOT)}:{example.line}"
            told = f"{where}\n{example.code}\nprinted:\n{answer.out}\n{answer.err}"
            assert answer.finished, told
            assert _unexpected(answer, example.expected) == [], told


def _unexpected(answer: Answer, expected: int | None) -> list[int]:
    """Error statuses that the page does not announce."""
    statuses = list(answer.statuses)
    if expected is not None and (not statuses or statuses.pop() != expected):
        return answer.statuses or [0]
    return [status for status in statuses if status >= 400]


def test_what_the_examples_left_in_the_logs_is_documented(server: Running) -> None:
    page = EVENTS_PAGE.read_text()
    with Anthropic(base_url=server.base_url, api_key=server.api_key) as client:
        seen = {
            event.type
            for session in client.beta.sessions.list(include_archived=True)
            for event in client.beta.sessions.events.list(session.id)
        }
    assert {"agent.message", "agent.tool_result", "session.status_idle"} <= seen, "the examples ran before"
    assert [kind for kind in sorted(seen) if f"`{kind}`" not in page] == []
