"""What an operator's bounds come to, and what is said of those that come to nothing."""

import logging
from pathlib import Path

import pytest

from managed_agents.core.settings import Settings
from managed_agents.processes.sandboxes import sandbox_plan

BOUNDS = "[env_1]\nmemory_bytes = 134217728\npids = 50\ncall_seconds = 10\n[env_2]\npool = 1\n"


def said(caplog: pytest.LogCaptureFixture, tmp_path: Path, sandbox: str, **more: object) -> list[str]:
    (tmp_path / "bounds.toml").write_text(BOUNDS)
    settings = Settings.model_validate(
        {"sandbox": sandbox, "data_dir": tmp_path, "sandbox_environments": tmp_path / "bounds.toml", **more}
    )
    with caplog.at_level(logging.WARNING):
        assert sandbox_plan(settings).spec("sbx_1", 1, None, "env_1").limits.pids == 50
    return [record.getMessage() for record in caplog.records]


@pytest.mark.requirement("ENV-089")
def test_bounds_that_the_local_backend_does_not_enforce_are_named(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    (line,) = said(caplog, tmp_path, "local", sandbox_cpus=1.5, sandbox_disk_bytes=2**30)
    assert line.endswith("MANAGED_AGENTS_SANDBOX_CPUS, env_1.memory_bytes, env_1.pids")


def test_where_they_are_enforced_nothing_is_said(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    assert said(caplog, tmp_path, "docker", sandbox_cpus=1.5) == []
