"""What sandboxes are made like: the settings, and a file in which the operator gives single environments other bounds and a pool.

The file is the operator's, not the API's: whoever may create an environment must not thereby get more of the machine.
"""

import logging
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from managed_agents.core.settings import Settings
from managed_agents.processes import egress
from managed_agents.processes.settings import CannotStart
from managed_agents.sandbox.backend import Limits, SandboxSpec
from managed_agents.sandbox.local import UNBOUNDED

logger = logging.getLogger(__name__)
POOL_MAX = 100


class EnvironmentBounds(BaseModel):
    """A table of the file; what is missing is as for every environment."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    memory_bytes: int | None = Field(None, ge=64 * 1024**2)
    disk_bytes: int | None = Field(None, ge=64 * 1024**2)
    cpus: float | None = Field(None, gt=0)
    pids: int | None = Field(None, ge=16)
    open_files: int | None = Field(None, ge=64, le=1_048_576)
    output_bytes: int | None = Field(None, ge=1024**2)
    call_seconds: float | None = Field(None, gt=0, le=600)
    pool: int = Field(0, ge=0, le=POOL_MAX)


@dataclass(frozen=True, slots=True)
class SandboxPlan:
    """What to provision, by environment."""

    base: SandboxSpec
    environments: Mapping[str, EnvironmentBounds] = field(default_factory=dict[str, EnvironmentBounds])

    def spec(self, sandbox_id: str, generation: int, session_id: str | None, environment_id: str) -> SandboxSpec:
        """What to make for a session of an environment."""
        limits = self.base.limits
        if (own := self.environments.get(environment_id)) is not None:
            limits = replace(limits, **own.model_dump(exclude_none=True, exclude={"pool"}))
        return replace(self.base, id=sandbox_id, generation=generation, session_id=session_id, limits=limits)

    @property
    def pools(self) -> dict[str, int]:
        """How many sandboxes to keep ready, by environment."""
        return {environment_id: own.pool for environment_id, own in self.environments.items() if own.pool}


def sandbox_plan(settings: Settings) -> SandboxPlan:
    """The plan of the settings.

    Raises:
        CannotStart: the file cannot be read, or says what does not exist.
    """
    limits = Limits(**{each.name: getattr(settings, f"sandbox_{each.name}") for each in fields(Limits)})
    base = SandboxSpec("", 0, settings.sandbox_image, limits, "gateway", egress.ca_bundle(settings))
    environments = {} if settings.sandbox_environments is None else _read(settings.sandbox_environments)
    if settings.sandbox == "local" and (idle := _without_effect(settings, environments)):
        logger.warning("the `local` sandbox enforces no bound of memory, CPUs, processes or open files: %s", ", ".join(idle))
    return SandboxPlan(base, environments)


def _without_effect(settings: Settings, environments: Mapping[str, EnvironmentBounds]) -> list[str]:
    """Bounds that the operator has set and the `local` backend does not know."""
    of_all = [f"MANAGED_AGENTS_SANDBOX_{name.upper()}" for name in UNBOUNDED if f"sandbox_{name}" in settings.model_fields_set]
    own = [f"{key}.{name}" for key, table in environments.items() for name in UNBOUNDED if name in table.model_fields_set]
    return of_all + own


def _read(path: Path) -> dict[str, EnvironmentBounds]:
    name = f"MANAGED_AGENTS_SANDBOX_ENVIRONMENTS={path}"
    try:
        found: dict[str, Any] = tomllib.loads(path.read_text())
        return TypeAdapter(dict[str, EnvironmentBounds]).validate_python(found)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise CannotStart(f"{name} cannot be read: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise CannotStart(f"{name}: {'.'.join(str(part) for part in first['loc'])}: {first['msg']}") from error
