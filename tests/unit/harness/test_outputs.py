"""Bounds on outputs: what a look costs does not depend on how many files there are already."""

from collections.abc import ItemsView, Iterator, ValuesView

import pytest

from managed_agents.core import limits
from managed_agents.harness.outputs import PATH_BYTES_MAX, Taken, never


class Counted(dict[str, int]):
    """Says how often it was gone through."""

    times = 0

    def values(self) -> ValuesView[int]:
        self.times += 1
        return super().values()

    def items(self) -> ItemsView[str, int]:
        self.times += 1
        return super().items()

    def __iter__(self) -> Iterator[str]:
        self.times += 1
        return super().__iter__()


def test_thousands_of_refusals_go_through_the_files_once() -> None:
    sizes = Counted((str(number), 1) for number in range(limits.OUTPUT_FILES_MAX))
    taken = Taken(sizes)
    refusals = {taken.refusal(f"more {number}", 1) for number in range(10_000)}
    assert refusals == {f"the session has {limits.OUTPUT_FILES_MAX} outputs"}
    assert sizes.times == 1


def test_a_file_is_counted_in_place_of_the_one_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "OUTPUT_BYTES_MAX", 10)
    monkeypatch.setattr(limits, "OUTPUT_FILES_MAX", 2)
    taken = Taken({"a": 6})
    assert taken.refusal("b", 4) is None
    assert taken.refusal("b", 5) == "the session's outputs would take more than 10 bytes"
    assert taken.refusal("a", 10) is None
    taken.add("a", 1)
    taken.add("b", 9)
    assert taken.refusal("a", 2) is not None
    assert taken.refusal("c", 0) == "the session has 2 outputs"
    taken.add("b", 3)
    assert taken.refusal("a", 7) is None


def test_some_files_are_never_taken() -> None:
    assert never("é" * (PATH_BYTES_MAX // 2), limits.FILE_BYTES_MAX) is None
    assert never("é" * PATH_BYTES_MAX, 0) is not None
    assert never("a", limits.FILE_BYTES_MAX + 1) is not None
