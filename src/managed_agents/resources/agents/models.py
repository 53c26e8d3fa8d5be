"""What known models take of an agent's `model`: levels of effort, speed `fast`, a region; and their default effort.

Pure. Judged is only what was published of a model by `AS_OF`. Any other name may be a model of the operator's own endpoint: what
that takes is asked of `GET /v1/models` when it is used, and the harness then sends the nearest level that there is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from managed_agents.core.errors import InvalidRequest
from managed_agents.model.names import alias
from managed_agents.resources.agents.schemas import EffortLevel

AS_OF = "2026-11-01"
EFFORT_DEFAULT = "high"
EFFORTS = get_args(EffortLevel)


@dataclass(frozen=True, slots=True)
class Takes:
    """What one model takes."""

    # Where there are no levels, the default is accepted all the same: agents show it, and clients send back what they were shown.
    efforts: Sequence[str] = EFFORTS
    effort_default: str = EFFORT_DEFAULT
    fast: bool = False
    inference_geo: bool = True


_FIRST_WITH_EFFORT = ("low", "medium", "high")
_BEFORE_XHIGH = ("low", "medium", "high", "max")

# From the vendor's public pages on effort, fast mode and data residency.
KNOWN: Mapping[str, Takes] = {
    "claude-fable-5-2": Takes(),
    "claude-fable-5-1": Takes(),
    "claude-fable-5": Takes(),
    "claude-opus-5-5": Takes(effort_default="medium", fast=True),
    "claude-opus-5": Takes(fast=True),
    "claude-opus-4-8": Takes(fast=True),
    "claude-opus-4-7": Takes(),
    "claude-opus-4-6": Takes(_BEFORE_XHIGH),
    "claude-opus-4-5": Takes(_FIRST_WITH_EFFORT, inference_geo=False),
    "claude-sonnet-5-5": Takes(),
    "claude-sonnet-5": Takes(),
    "claude-sonnet-4-6": Takes(_BEFORE_XHIGH),
    "claude-sonnet-4-5": Takes((), inference_geo=False),
    "claude-haiku-5-5": Takes(effort_default="medium"),
    "claude-haiku-4-5": Takes((), inference_geo=False),
}


def effort_default(model: str) -> str:
    """Return the level of a model that none was given for."""
    known = KNOWN.get(alias(model))
    return EFFORT_DEFAULT if known is None else known.effort_default


def check(model: str, path: str, *, effort: str | None, speed: str | None, inference_geo: str | None) -> None:
    """Refuse what a known model does not take of what was given. Raises `InvalidRequest`."""
    known = KNOWN.get(alias(model))
    # A Claude model that is newer than the table may take any effort; fast is for few of them.
    if speed == "fast" and not (known.fast if known is not None else not model.startswith("claude-")):
        raise InvalidRequest(f'{path}.speed: "fast" is not supported by {model}')
    if known is None:
        return
    if effort is not None and effort not in (known.efforts or (EFFORT_DEFAULT,)):
        levels = f"which takes {', '.join(known.efforts)}" if known.efforts else "which has no levels of effort"
        raise InvalidRequest(f'{path}.effort: "{effort}" is not supported by {model}, {levels}')
    if inference_geo is not None and not known.inference_geo:
        raise InvalidRequest(f"{path}.inference_geo: not supported by {model}")
