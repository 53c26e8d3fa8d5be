"""Instants on the wire. Objects show milliseconds, events microseconds; both are UTC with `Z` (spec: observed)."""

from datetime import UTC, datetime


def now() -> datetime:
    """Return the host's clock, aware, in UTC. Rules that matter across processes use the database's clock instead."""
    return datetime.now(UTC)


def millis(instant: datetime) -> str:
    """Format as `2026-04-03T18:24:10.412Z`."""
    return instant.astimezone(UTC).isoformat(timespec="milliseconds")[:-6] + "Z"


def micros(instant: datetime) -> str:
    """Format as `2026-04-03T18:24:10.412345Z`."""
    return instant.astimezone(UTC).isoformat(timespec="microseconds")[:-6] + "Z"
