"""What an owner believes to know of its session's newest input."""

from typing import Any

import pytest

from managed_agents.harness.context import Context
from managed_agents.harness.transcript import Transcript


@pytest.fixture
def context() -> Context:
    return Context("sesn_1", 5, None, Transcript)


@pytest.mark.parametrize(
    ("at", "steps", "current"),
    [
        (5, ["append", "committed"], True),
        (6, ["append", "committed"], False),  # input that we do not have
        (5, ["append", "committed", "hint"], False),
        # The hint overtakes the answer of an append that was committed before the input came.
        (5, ["append", "hint", "committed"], False),
        (5, ["hint", "append", "committed"], True),  # the append saw what the hint was about
    ],
)
def test_a_hint_is_never_lost_to_an_append_that_was_begun_before(
    context: Context, at: int, steps: list[str], current: bool
) -> None:
    seen: Any = None
    for step in steps:
        if step == "append":
            seen = context.hints
        elif step == "hint":
            context.hinted()
        else:
            context.committed(at, seen)
    assert context.current is current
