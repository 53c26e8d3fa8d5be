"""Every scenario and every fault point: a worker dies there, another one goes on, and the log is that of undisturbed work."""

from collections.abc import Awaitable, Callable
from typing import Any
from zlib import crc32

import pytest

from managed_agents.core import faults
from tests.crash import script
from tests.crash.matrix import page
from tests.crash.matrix.rig import Rig, Run
from tests.crash.matrix.scenarios import PASSED, SCENARIOS, Scenario, points, without_retries
from tests.support.following import Event
from tests.support.invariants import normalised

pytestmark = pytest.mark.anyio


def compared(scenario: Scenario, run: Run, events: list[Event]) -> list[Event]:
    """The part of a history that must be the same whatever happened."""
    events = normalised(without_retries(events) if scenario.retries else events)
    for event in events:
        for block in event.get("content") or []:
            if "text" in block:
                block["text"] = block["text"].replace(run.session_id, "SESSION")
    return events


async def undisturbed(rig: Rig, name: str) -> list[Event]:
    """What is compared with, from the first run of a scenario; fault points are counted on the way."""
    if name not in rig.expected:
        scenario = SCENARIOS[name]
        reached: dict[str, int] = {}
        for point in faults.REGISTERED:
            reached[point] = 0

            def count(point: str = point) -> None:
                reached[point] += 1

            faults.arm(point, count, nth=0)
        async with rig.run(scenario.tools, **scenario.fields) as run, rig.worker():
            await scenario.drive(run)
            listed = await rig.finished(run)
            check_side_effects(scenario, run)
        faults.disarm()
        rig.expected[name] = compared(scenario, run, listed)
        rig.reached[name] = {point: times for point, times in reached.items() if times}
    return rig.expected[name]


def check_side_effects(scenario: Scenario, run: Run) -> None:
    assert [side.read_text() for side in run.files(script.SIDE)] == ["ran\n"] * scenario.counts
    assert not run.files("never")


def prepare(rig: Rig, scenario: Scenario) -> None:
    rig.cluster.model.reply = scenario.reply
    rig.cluster.model.limit_context(scenario.context_tokens)


def cases(*, kill: bool) -> list[Any]:
    """(scenario, point, passage): each point of each scenario once, as a kill in one scenario only; all others full."""
    found: list[Any] = []
    for name in SCENARIOS:
        for point, times in points(name).items():
            reaching = [other for other in SCENARIOS if point in points(other)]
            often = not kill or name == reaching[_pick(point, len(reaching))]
            chosen = 1 + _pick(f"{name} {point}", times)
            for nth in range(1, times + 1):
                marks = [] if often and nth == chosen else pytest.mark.full
                found.append(pytest.param(name, point, nth, id=f"{name}-{point}-{nth}", marks=marks))
    return found


def _pick(of: str, count: int) -> int:
    """One of so many: any, but always the same."""
    return crc32(of.encode()) % count


@pytest.mark.parametrize("name", SCENARIOS)
async def test_undisturbed_work_passes_the_points_that_the_matrix_says(rig: Rig, name: str) -> None:
    prepare(rig, SCENARIOS[name])
    await undisturbed(rig, name)
    assert {point: times for point, times in points(name).items() if rig.reached[name].get(point, 0) < times} == {}


@pytest.mark.parametrize(("name", "point", "nth"), cases(kill=False))
async def test_a_worker_that_fails_leaves_the_log_of_undisturbed_work(rig: Rig, name: str, point: str, nth: int) -> None:
    await disturbed(rig, name, lambda: rig.fail_a_worker(point, nth))
    rig.passed.add((name, point, nth, "exception"))


@pytest.mark.requirement("EVT-071")
@pytest.mark.parametrize(("name", "point", "nth"), cases(kill=True))
async def test_a_worker_that_is_killed_leaves_the_log_of_undisturbed_work(rig: Rig, name: str, point: str, nth: int) -> None:
    await disturbed(rig, name, lambda: rig.kill_a_worker(point, nth))
    rig.passed.add((name, point, nth, "kill"))


async def disturbed(rig: Rig, name: str, end_a_worker: Callable[[], Awaitable[None]]) -> None:
    """Do the scenario's work while a worker ends, and compare."""
    scenario = SCENARIOS[name]
    prepare(rig, scenario)
    expected = await undisturbed(rig, name)
    async with rig.run(scenario.tools, **scenario.fields) as run:
        await rig.disturbed(lambda: scenario.drive(run), end_a_worker)
        listed = await rig.finished(run)
    assert compared(scenario, run, listed) == expected
    check_side_effects(scenario, run)
    run.remove_sandboxes()


@pytest.mark.full
def test_the_page_is_written_by_the_run_that_filled_it(rig: Rig) -> None:
    wanted = {(name, point, nth) for name in SCENARIOS for point, times in points(name).items() for nth in range(1, times + 1)}
    for how in ("exception", "kill"):
        assert {case[:3] for case in rig.passed if case[3] == how} == wanted, "only a whole run writes the page"
    page.PATH.write_text(page.text())


def test_the_page_shows_every_scenario_and_every_fault_point() -> None:
    assert page.PATH.read_text() == page.text(), "the matrix has changed: `make test-full` fills it again"


def test_every_registered_fault_point_is_in_a_test() -> None:
    page.import_everything()
    assert set(faults.REGISTERED) == set(PASSED) | set(page.ELSEWHERE)
