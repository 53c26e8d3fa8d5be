"""What deploy/ promises: units that systemd accepts, a compose file that says what the server needs, containers that work."""

import os
import re
import shutil
import subprocess
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from anthropic import Anthropic

from managed_agents.cli.flags import read_settings
from managed_agents.core.settings import Settings
from managed_agents.db import embedded
from managed_agents.processes import lifetime, parent
from managed_agents.processes.worker import installation_of
from tests.docs.pages import ROOT
from tests.integration.boot.waiting import until
from tests.operations.compose import DEPLOY, Project, Unset, docker, load, names_of_variables, with_sized_disks

UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
IMAGE, BASE, POSTGRES = "managed-agents:test", "managed-agents-base:latest", "managed-agents-test-postgres:latest"
API_KEY = "sk-ma-the-first-key-of-tests"
SERVER_UID = 8484
BUILD_SECONDS_MAX = 900.0
NEEDED = {"POSTGRES_PASSWORD": "secret", "MANAGED_AGENTS_API_KEY": API_KEY, "DOCKER_GROUP": "1"}
# SIGTERM, then at the longest: the wait for a signal said twice, the process's own bound, and a margin.
STOP_SECONDS_MIN = lifetime.SAME_REQUEST_SECONDS + lifetime.STOP_SECONDS_MAX + 5
DRAIN_SECONDS: float = Settings.model_fields["drain_seconds"].default  # a worker's, before that


def unit_values(unit: Path) -> dict[str, str]:
    return dict(line.split("=", 1) for line in unit.read_text().splitlines() if re.match(r"\w+=", line))


@pytest.mark.parametrize("unit", [unit for unit in UNITS if "migrate" not in unit.name], ids=lambda unit: unit.stem)
def test_units_stop_and_restart_as_processes_need_it(unit: Path) -> None:
    values = unit_values(unit)
    drain = DRAIN_SECONDS if "worker" in unit.name else 0
    assert float(values["TimeoutStopSec"]) >= STOP_SECONDS_MIN + drain
    assert values["KillMode"] == "mixed"
    assert values["Restart"] == "always"
    assert str(parent.CANNOT_START_STATUS) in values["RestartPreventExitStatus"].split()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd on this machine")
def test_systemd_accepts_the_units(tmp_path: Path) -> None:
    for unit in UNITS:
        # What it starts must exist, and is installed somewhere else here.
        (tmp_path / unit.name).write_text(unit.read_text().replace("/opt/managed-agents/bin/managed-agents", "/bin/true"))
    drop_in = tmp_path / "managed-agents-worker.service.d"
    drop_in.mkdir()
    shutil.copy(DEPLOY / "systemd" / "sized-disks.conf", drop_in)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *(str(tmp_path / unit.name) for unit in UNITS)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    ours = [line for line in (done.stdout + done.stderr).splitlines() if "managed-agents" in line or str(tmp_path) in line]
    assert ours == []


def test_the_example_of_the_environment_names_every_variable_of_the_compose_file() -> None:
    example = (DEPLOY / "example.env").read_text()
    assert {name for name in names_of_variables() if not re.search(rf"^#?{name}=", example, re.MULTILINE)} == set()
    for name in NEEDED:
        with pytest.raises(Unset, match=name):
            load({k: v for k, v in NEEDED.items() if k != name})


def test_the_compose_file_says_what_the_server_needs() -> None:
    services = load(NEEDED)["services"]
    settings = {f"MANAGED_AGENTS_{name.upper()}" for name in Settings.model_fields}
    for name in ("migrate", "api", "worker"):
        service = services[name]
        assert {each for each in service["environment"] if each.startswith("MANAGED_AGENTS_")} <= settings
        data_dir = service["environment"]["MANAGED_AGENTS_DATA_DIR"]
        assert f"{data_dir}:{data_dir}" in service["volumes"], "the engine mounts directories below it by the host's paths"
        assert float(service["stop_grace_period"].removesuffix("s")) >= STOP_SECONDS_MIN + DRAIN_SECONDS
        assert any("docker.sock" in volume for volume in service["volumes"]) == (name == "worker")
    assert services["worker"]["hostname"], "sandboxes know their host by this name"
    volumes = with_sized_disks(load(NEEDED), NEEDED)["services"]["worker"]["volumes"]
    assert f"{data_dir}:{data_dir}:rshared" in volumes
    assert f"{data_dir}:{data_dir}" not in volumes


NOT_PASSED = {
    "sandbox": "docker",
    "local_sandbox_unsafe": "of the other backend",
    "host_name": "the container's host name is it",
    "egress": "there is no service for it here",
    "script": "of `up`",
    "faults": "of tests",
}


def test_every_setting_reaches_the_process_that_uses_it() -> None:
    """One that stands in .env and has no effect looks as if it had."""
    wanted = {f"MANAGED_AGENTS_{name.upper()}": f"a {name}" for name in Settings.model_fields}
    services = load(NEEDED | wanted)["services"]
    given = {name: services[name]["environment"] for name in ("migrate", "api", "worker")}
    passed = {name for each in given.values() for name in each}
    assert {name for name in wanted if name not in passed} == {f"MANAGED_AGENTS_{name.upper()}" for name in NOT_PASSED}
    fixed = {f"MANAGED_AGENTS_{name}" for name in ("HOST", "PORT", "METRICS_PORT", "DATABASE_URL")}
    for each in given.values():
        assert [name for name in each.keys() & wanted.keys() - fixed if each[name] != wanted[name]] == []
    # The api refuses what needs a search provider, the worker asks it.
    assert "MANAGED_AGENTS_WEB_SEARCH" in given["api"].keys() & given["worker"].keys()
    # Nobody has a secret that it does not use.
    assert not {"ANTHROPIC_API_KEY", "MANAGED_AGENTS_MODEL_API_KEY", "MANAGED_AGENTS_WEB_SEARCH_API_KEY"} & given["api"].keys()
    assert "MANAGED_AGENTS_API_KEY" not in given["worker"]


@pytest.mark.parametrize("process", ["migrate", "api", "worker"])
def test_what_env_does_not_set_has_its_default(process: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in load(NEEDED)["services"][process]["environment"].items():
        monkeypatch.setenv(name, value)
    settings = read_settings({})
    fixed = {"host", "port", "metrics_port", "database_url", "data_dir", "api_key"}
    given = {name: value for name, value in settings if name not in fixed}
    assert given == {name: Settings.model_fields[name].default for name in given}


def test_the_image_s_build_sees_everything_that_the_wheel_is_made_of() -> None:
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    copied = set(re.findall(r"^COPY (?:--\S+ )?(.+) \S+$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE))
    copied = {name for names in copied for name in names.split()}
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for part in ["pyproject.toml", "README.md", "LICENSE", "src", *wheel["force-include"]]:
        assert part in copied, f"deploy/Dockerfile does not copy {part}"
        assert part in let_in, f".dockerignore keeps {part} out"


@pytest.fixture(scope="module")
def image() -> Iterator[str]:
    """The server image, built as documented for machines without a registry, and a Postgres to go with it."""
    build = [os.fspath(ROOT / ".venv/bin/python"), DEPLOY / "build.py", "--image", IMAGE]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, timeout=BUILD_SECONDS_MAX)
    assert done.returncode == 0, done.stdout + done.stderr
    with tempfile.TemporaryDirectory(prefix="ma-postgres-image-") as directory:
        binaries = embedded.find_binaries().prefix.parent
        for part in (binaries, binaries.with_name(f"{binaries.name}.libs")):
            shutil.copytree(part, Path(directory) / part.name)
        shutil.copytree(Path(__file__).with_name("postgres_image"), directory, dirs_exist_ok=True)
        docker("build", "-q", "-t", POSTGRES, "--build-arg", f"BASE={BASE}", directory)
    yield IMAGE
    docker("image", "rm", "-f", IMAGE, POSTGRES)
    if stages := docker("image", "ls", "-q", "--filter", "dangling=true", "--filter", "label=managed-agents.stage=build"):
        docker("image", "rm", "-f", *stages.split())


@pytest.fixture
def data_dir() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="ma-compose-", dir="/var/tmp") as directory:
        # A file system of its own that is shared with containers, as `/` is under systemd and need not be here.
        subprocess.run(["mount", "--bind", directory, directory], check=True)
        subprocess.run(["mount", "--make-shared", directory], check=True)
        shutil.chown(directory, SERVER_UID, SERVER_UID)
        yield Path(directory)
        if found := docker("ps", "-aq", "--filter", f"label=managed-agents.installation={installation_of(Path(directory))}"):
            docker("rm", "-f", "-v", *found.split())
        if found := docker(
            "volume", "ls", "-q", "--filter", f"label=managed-agents.installation={installation_of(Path(directory))}"
        ):
            docker("volume", "rm", "-f", *found.split())
        for disk in Path(directory).glob("sandboxes/*/disk"):
            subprocess.run(["umount", "--lazy", disk], check=False)
        subprocess.run(["umount", "--lazy", directory], check=True)


@pytest.fixture(params=["volumes", "sized disks"])
def project(image: str, data_dir: Path, request: pytest.FixtureRequest) -> Iterator[Project]:
    variables = {
        "MANAGED_AGENTS_IMAGE": image,
        "POSTGRES_IMAGE": POSTGRES,
        "POSTGRES_PASSWORD": uuid4().hex,
        "MANAGED_AGENTS_API_KEY": API_KEY,
        "DOCKER_GROUP": str(Path("/var/run/docker.sock").stat().st_gid),
        "MANAGED_AGENTS_DATA_DIR": str(data_dir),
        "MANAGED_AGENTS_LISTEN": "127.0.0.1:0",
        "MANAGED_AGENTS_MODEL_BASE_URL": "http://scripted-model:8484",
        "MANAGED_AGENTS_MODEL_API_KEY": "scripted",
    }
    file = load(variables)
    if request.param == "sized disks":
        file = with_sized_disks(file, variables)
    made = Project(f"ma-test-{uuid4().hex[:8]}", file)
    try:
        yield made
        print(made.logs())
    finally:
        made.down()


@pytest.mark.full
@pytest.mark.docker
@pytest.mark.timeout(1800)
def test_a_session_runs_through_the_containers_of_the_compose_file(project: Project, data_dir: Path) -> None:
    project.up("scripted-model", "api", "worker")
    for service in ("api", "worker"):
        project.healthy(service)
    assert docker("exec", project.container("api"), "id", "-u") == str(SERVER_UID)
    address = docker("port", project.container("api"), "8484/tcp").splitlines()[0]
    client = Anthropic(base_url=f"http://{address}", api_key=API_KEY, _strict_response_validation=True)
    environment = client.beta.environments.create(name="compose")
    agent = client.beta.agents.create(name="compose", model="claude-opus-4-8", tools=[{"type": "agent_toolset_20260401"}])
    session = client.beta.sessions.create(agent=agent.id, environment_id=environment.id)

    def turn(task: str, count: int) -> str:
        client.beta.sessions.events.send(
            session.id, events=[{"type": "user.message", "content": [{"type": "text", "text": f"run: {task}"}]}]
        )

        def results() -> list[str]:
            events = list(client.beta.sessions.events.list(session.id))
            rested = sum(event.type == "session.status_idle" for event in events) == count
            return [event.content[0].text for event in events if event.type == "agent.tool_result"] if rested else []

        return until(results, "the session to rest", 120)[-1]

    assert "hello" in turn("echo hello | tee /workspace/kept", 1)
    sized = "cap_add" in project.file["services"]["worker"]
    assert bool(list(data_dir.glob("sandboxes/*/disk.img"))) == sized
    # A new container of the same host: the sandbox is still there.
    docker("stop", project.container("worker"))
    assert project.state("worker")["ExitCode"] == 0
    docker("rm", project.container("worker"))
    project.up("worker")
    assert "hello" in turn("cat /workspace/kept", 2)
    client.close()
    docker("stop", project.container("api"))
    assert project.state("api")["ExitCode"] == 0
