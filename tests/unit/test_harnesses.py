"""Harnesses that an operator names are loaded when the worker starts, or it does not start."""

import pytest

from managed_agents.core.settings import Settings
from managed_agents.harness.brain import STANDARD
from managed_agents.processes.settings import CannotStart
from managed_agents.processes.worker import harnesses_of
from tests.integration.harness.tiny import TinyHarness


def test_named_harnesses_stand_beside_the_standard_one() -> None:
    found = harnesses_of(Settings(harnesses="tiny=tests.integration.harness.tiny:TinyHarness, "))
    assert set(found) == {STANDARD, "tiny"}
    assert isinstance(found["tiny"], TinyHarness)
    assert set(harnesses_of(Settings())) == {STANDARD}


@pytest.mark.parametrize("wrong", ["tiny", "tiny=nowhere:Harness", "tiny=json:Nothing", "=a:b", "a=json:"])
def test_one_that_cannot_be_loaded_keeps_the_worker_from_starting(wrong: str) -> None:
    with pytest.raises(CannotStart, match="MANAGED_AGENTS_HARNESSES"):
        harnesses_of(Settings(harnesses=wrong))
