"""The arithmetic of one budget. Pure.

Time is cut into slots. A block taken out of a budget may be spent until the end of the next slot, and is charged to that
slot. Invariant: in no 60 seconds, wherever they begin, are more requests let through than the limit.

Why it holds: take any minute and the last block, granted at `g`, that was spent in it. Whatever else was spent in that
minute was granted by then and was spendable after `g` - 60 s, so it was charged to a slot that ends after `g` - 60 s; and the
sum over exactly these slots was at most the limit when the block was granted. Blocks that were not spent are given back.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

SLOT_SECONDS = 2.0
MINUTE_SLOTS = 30
KEPT_SLOTS = MINUTE_SLOTS + 2  # from the one that ends within the minute to the one blocks are charged to now


@dataclass(frozen=True, slots=True)
class Charges:
    """`counts[i]` are charged to slot `newest - i`."""

    newest: int
    counts: tuple[int, ...]

    @classmethod
    def of(cls, newest: int, counts: Sequence[int]) -> "Charges":
        """Return charges of as many slots as are kept."""
        return cls(newest, tuple([*counts, *[0] * KEPT_SLOTS][:KEPT_SLOTS]))


@dataclass(frozen=True, slots=True)
class Grant:
    """A block: `count` requests until `seconds` from the instant it was asked for; what is left in the budget; how long until
    some of it, and all of it, is free again.
    """

    count: int
    slot: int
    seconds: float
    remaining: int
    next_free_seconds: float
    all_free_seconds: float


def slot_at(instant: float) -> int:
    """Return the slot of an instant, in seconds since 1970."""
    return int(instant // SLOT_SECONDS)


def take(
    charges: Charges, instant: float, *, limit: int, asked: int, returned: Mapping[int, int] | None = None
) -> tuple[Charges, Grant]:
    """Give unspent requests back (`returned`: how many of which slot), then take out up to `asked`."""
    slot = slot_at(instant) + 1
    newest = max(charges.newest, slot)
    shift = newest - charges.newest
    counts = [*[0] * min(shift, KEPT_SLOTS), *charges.counts][:KEPT_SLOTS]
    for of_slot, unspent in (returned or {}).items():
        if 0 <= newest - of_slot < KEPT_SLOTS:
            counts[newest - of_slot] = max(0, counts[newest - of_slot] - unspent)
    # Slots that end within the last minute, and the ones to come.
    counted = slot - MINUTE_SLOTS - 1
    out = sum(count for age, count in enumerate(counts) if newest - age >= counted)
    granted = max(0, min(asked, limit - out))
    counts[newest - slot] += granted
    charged = [newest - age for age, count in enumerate(counts) if count and newest - age >= counted]
    free = [(of_slot + MINUTE_SLOTS + 1) * SLOT_SECONDS - instant for of_slot in charged]
    grant = Grant(
        granted,
        slot,
        (slot + 1) * SLOT_SECONDS - instant,
        max(0, limit - out - granted),
        max(0.0, min(free, default=0.0)),
        max(0.0, max(free, default=0.0)),
    )
    return Charges(newest, tuple(counts)), grant
