"""The arithmetic of budgets: in no minute more than the limit, whoever takes what when and dies in between."""

import random
from dataclasses import dataclass

import pytest

from managed_agents.resources.rate_limits.window import Charges, take

LIMIT = 50


@dataclass
class Held:
    slot: int
    count: int
    ends_at: float


@pytest.mark.parametrize("seed", range(30))
def test_no_minute_has_more_than_the_limit(seed: int) -> None:
    chance = random.Random(seed)
    now = 1_800_000_000.0 + chance.random() * 10
    charges = Charges.of(0, [])
    held: list[list[Held]] = [[] for _ in range(4)]
    spent: list[float] = []
    for _ in range(3000):
        now += chance.choice((0.0, 0.001, 0.05, 0.4, 3.0)) * chance.random()
        process = held[chance.randrange(4)]
        ended = [block for block in process if block.ends_at <= now]
        process[:] = [block for block in process if block.ends_at > now]
        if not process and chance.random() < 0.7:
            returned: dict[int, int] = {}
            for block in ended:
                returned[block.slot] = returned.get(block.slot, 0) + block.count
            if chance.random() < 0.1:
                returned = {}  # the process died
            charges, grant = take(charges, now, limit=LIMIT, asked=chance.randrange(1, 12), returned=returned)
            if grant.count:
                process.append(Held(grant.slot, grant.count, now + grant.seconds))
        while process and chance.random() < 0.9:
            block = process[0]
            block.count -= 1
            spent.append(now)
            if block.count == 0:
                process.pop(0)
    assert len(spent) > LIMIT
    begin = 0
    for end, instant in enumerate(spent):
        while spent[begin] <= instant - 60.0:
            begin += 1
        assert end - begin + 1 <= LIMIT, f"seed {seed}"


def test_a_steady_flood_gets_nearly_all_of_the_limit() -> None:
    charges, now, granted = Charges.of(0, []), 1_000_000.0, 0
    for _ in range(6000):  # ten minutes, ten asks a second
        charges, grant = take(charges, now, limit=300, asked=30)
        granted += grant.count
        now += 0.1
    assert 0.9 * 3000 <= granted <= 3000 + 300


def test_a_used_up_budget_says_when_it_is_free_again() -> None:
    charges, grant = take(Charges.of(0, []), 1001.0, limit=10, asked=10)
    assert (grant.count, grant.remaining) == (10, 0)
    charges, refused = take(charges, 1003.5, limit=10, asked=1)
    assert refused.count == 0
    _, again = take(charges, 1003.5 + refused.next_free_seconds, limit=10, asked=99)
    assert again.count == 10
    _, before = take(charges, 1003.4 + refused.next_free_seconds, limit=10, asked=1)
    assert before.count == 0


def test_what_comes_back_late_is_not_given_twice() -> None:
    charges, grant = take(Charges.of(0, []), 1001.0, limit=10, asked=10)
    charges, _ = take(charges, 5000.0, limit=10, asked=4, returned={grant.slot: 10})
    _, rest = take(charges, 5000.0, limit=10, asked=99, returned={grant.slot: 10})
    assert rest.count == 6
