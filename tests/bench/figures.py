"""What a bench section gives back, and how it is shown. Milliseconds hold on one machine; the ratio is what lasts."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """One line: what was measured, its target, the baseline of the same run, and whether the target was met."""

    name: str
    measured: str
    target: str
    met: bool
    baseline: str = ""

    def line(self) -> str:
        mark = "ok  " if self.met else "MISS"
        beside = f"   [{self.baseline}]" if self.baseline else ""
        return f"{mark}  {self.name:<50} {self.measured:<40} target {self.target}{beside}"


def percentile(values: Sequence[float], share: float) -> float:
    """Nearest-rank percentile; `share` between 0 and 1."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def best(rounds: Sequence[Sequence[float]], share: float = 0.5) -> float:
    """The least of the rounds' percentiles: other load on the machine only ever adds."""
    return min(percentile(values, share) for values in rounds)


def ms(seconds: float) -> str:
    """Seconds as milliseconds."""
    return f"{seconds * 1000:.2f} ms"
