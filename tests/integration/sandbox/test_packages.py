"""Images with packages: installed once per content, from an index that this test serves; a failure says what the tool said."""

import functools
import http.server
import io
import os
import shutil
import subprocess
import tarfile
import tempfile
import threading
import time
import zipfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import anyio
import pytest

from managed_agents.sandbox import docker, packages
from managed_agents.sandbox.backend import PackagesFailed
from managed_agents.sandbox.distribution import run
from managed_agents.sandbox.docker import DockerBackend
from managed_agents.sandbox.local import LocalBackend
from managed_agents.sandbox.packages import REPOSITORY, InstallSettings, PackageImages, script
from tests.integration.sandbox.contract import IMAGE, Bench, new_call, text
from tests.support.sandboxes import nothing_known
from tests.support.waiting import until

pytestmark = [pytest.mark.anyio, pytest.mark.docker]
SECONDS = 120


def wheel(name: str, version: str) -> bytes:
    """A wheel of one module that knows its version, and a command."""
    made = io.BytesIO()
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}.py": f"VERSION = {version!r}\ndef main():\n    print({name!r}, VERSION)\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": f"[console_scripts]\n{name} = {name}:main\n",
    }
    record = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(made, "w") as archive:
        for path, content in [*files.items(), (f"{info}/RECORD", record)]:
            archive.writestr(path, content)
    return made.getvalue()


def endless_source() -> bytes:
    """A source package whose build fills the disk and goes on."""
    backend = "import signal\ndef build_wheel(*_, **__):\n    open('/filled', 'wb').write(bytes(16 << 20))\n    signal.pause()\n"
    project = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz") as archive:
        for name, content in (("pyproject.toml", project), ("backend.py", backend)):
            entry = tarfile.TarInfo(f"filling-1.0/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content.encode()))
    return made.getvalue()


class Index(http.server.SimpleHTTPRequestHandler):
    """Serves a directory in the layout of a package index, and counts."""

    asked: list[str] = []
    released = threading.Event()

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if self.path == "/simple/slow/":
            self.released.wait(SECONDS)
        super().do_GET()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base's name
        """Silent."""


@pytest.fixture(scope="module")
def index() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as directory:
        for name, version in (("madetool", "1.0"), ("madetool", "2.0")):
            place = Path(directory) / "simple" / name
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{name}-{version}-py3-none-any.whl").write_bytes(wheel(name, version))
        filling = Path(directory) / "simple" / "filling"
        filling.mkdir()
        (filling / "filling-1.0.tar.gz").write_bytes(endless_source())
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Index, directory=directory))
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/simple/"
        Index.released.set()
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module", params=["docker"])
async def made(request: pytest.FixtureRequest, index: str) -> AsyncIterator[Bench]:
    """A bench whose backends install from our index."""
    directory = Path(tempfile.mkdtemp(prefix="ma", dir="/tmp"))
    directory.chmod(0o755)
    yield Bench(request.param, directory, directory.name)
    backend = installer(directory, index)
    await backend.collect_orphans(nothing_known)
    images = images_of(backend)
    removed = await images.collect(kept_seconds=-1)
    assert removed
    assert left(directory.name) == {"containers": [], "images": []}
    assert await images.collect(kept_seconds=-1) == []
    await backend.aclose()
    shutil.rmtree(directory)


def installer(directory: Path, index: str, **settings: object) -> DockerBackend:
    values = {"environment": {"PIP_INDEX_URL": index, "PIP_FIND_LINKS": ""}, "network": "host", "seconds_max": 100.0, **settings}
    return DockerBackend(
        installation=directory.name,
        data_dir=directory / "data",
        run_dir=directory / "run",
        installs=InstallSettings(**values),  # type: ignore[arg-type]
    )


def images_of(backend: DockerBackend) -> PackageImages:
    return backend._images


def left(installation: str) -> dict[str, list[str]]:
    """Containers and images with packages of this installation."""
    label = f"label=managed-agents.installation={installation}"
    found = {"containers": ["docker", "ps", "-aq", "--filter", label], "images": ["docker", "images", "-q", "--filter", label]}
    return {
        name: subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.split()
        for name, command in found.items()
    }


async def test_a_probe_whose_process_died_is_removed_and_no_sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installation = f"probe-{tmp_path.name}-{os.getpid()}"
    backend = DockerBackend(installation=installation, data_dir=tmp_path / "data", run_dir=tmp_path / "run")
    labels = ["--label", f"managed-agents.installation={installation}", "--label", "managed-agents.part=probe"]
    await anyio.run_process(["docker", "create", *labels, IMAGE, "true"])
    try:
        assert await backend.list() == []
        await backend.collect_images()
        assert len(left(installation)["containers"]) == 1  # it may be at work
        monkeypatch.setattr(docker, "PROBE_STALE_SECONDS", -60.0)
        await backend.collect_images()
        assert left(installation)["containers"] == []
    finally:
        for container in left(installation)["containers"]:
            await anyio.run_process(["docker", "rm", "-f", container])
        await backend.aclose()


@pytest.mark.requirement("ENV-054")
async def test_packages_are_installed_once_and_shared(made: Bench, index: str) -> None:
    backend, another = installer(made.directory, index), installer(made.directory, index)
    wanted = {"pip": ["madetool==1.0"]}
    names: list[str] = []

    async def prepare(worker: DockerBackend) -> None:
        names.append(await worker.prepare(IMAGE, wanted))

    Index.asked.clear()
    with anyio.fail_after(SECONDS):
        async with anyio.create_task_group() as group:  # two workers of a host at once
            group.start_soon(prepare, backend)
            group.start_soon(prepare, another)
        assert names[0] == names[1] != IMAGE
        assert len([path for path in Index.asked if path.endswith(".whl")]) == 1
        assert await backend.prepare(IMAGE, {**wanted, "apt": []}) == names[0]
        assert await backend.prepare(IMAGE, {"apt": []}) == IMAGE
        sandbox = await backend.provision(replace(made.spec(), image=names[0]))
        shown = text(await sandbox.execute(new_call("bash", command="madetool; env | grep PIP_INDEX; cat /etc/hostname")))
        assert shown.startswith("madetool 1.0\n")
        assert index not in shown  # nor in what an image gives to commands
        shown = text(await sandbox.execute(new_call("bash", command="env")))
        assert index not in shown
        assert index not in run(["docker", "image", "inspect", names[0]], 30).stdout
        # Containers bear the labels of their image, which was one of an install: it is a sandbox all the same.
        assert [(found.id, found.running) for found in await backend.list()] == [(sandbox.id, True)]
        await sandbox.stop()
        attached = await another.attach(sandbox.id)
        assert text(await attached.execute(new_call("bash", command="madetool"))) == "madetool 1.0\n"
        await attached.aclose()
        # In use by a sandbox, an old image stays.
        assert await images_of(backend).collect(kept_seconds=-1) == []
        await sandbox.destroy()
    assert len(left(made.installation)["images"]) == 1
    await backend.aclose()
    await another.aclose()


@pytest.mark.requirement("ENV-055")
async def test_a_failing_package_says_what_its_tool_said_and_is_tried_again(made: Bench, index: str) -> None:
    backend = installer(made.directory, index)
    with anyio.fail_after(SECONDS):
        for _ in range(2):
            Index.asked.clear()
            with pytest.raises(PackagesFailed) as failed:
                await backend.prepare(IMAGE, {"pip": ["madetool==3.0"]})
            assert "pip failed with status 1. It said:\n" in str(failed.value)
            assert "No matching distribution found for madetool==3.0" in str(failed.value)
            assert Index.asked
        with pytest.raises(PackagesFailed, match=r"cargo failed with status 127\. It said:\ncargo is not in the sandbox image"):
            await backend.prepare(IMAGE, {"cargo": ["hyperfine"], "pip": ["madetool"]})
        slow = installer(made.directory, index, seconds_max=2.0)
        with pytest.raises(PackagesFailed, match="took more than 2 s"):
            await slow.prepare(IMAGE, {"pip": ["slow"]})
        await slow.aclose()
    assert left(made.installation)["containers"] == []
    await backend.aclose()


@pytest.mark.requirement("ENV-088")
async def test_an_install_that_fills_the_disk_is_ended_and_told_the_bound(
    made: Bench, index: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "DISK_LOOK_SECONDS", 0.1)
    filling = installer(made.directory, index, disk_bytes=8 * 1024**2)
    told = r"pip wrote \d+ bytes to disk, and 8388608 is the bound \(MANAGED_AGENTS_PACKAGES_DISK_BYTES\)"
    with anyio.fail_after(SECONDS):
        with pytest.raises(PackagesFailed, match=told):
            await filling.prepare(IMAGE, {"pip": ["filling"]})
    assert left(made.installation)["containers"] == []
    await filling.aclose()


@pytest.mark.requirement("ENV-088")
async def test_where_images_are_too_large_together_the_longest_unwanted_goes(made: Bench, index: str) -> None:
    backend = installer(made.directory, index, images_bytes=0)
    images = images_of(backend)
    with anyio.fail_after(SECONDS):
        old = (await backend.prepare(IMAGE, {"pip": ["madetool==1.0"]})).partition(":")[2]
        new = (await backend.prepare(IMAGE, {"pip": ["madetool==2.0"]})).partition(":")[2]
        assert await images.collect() == []  # both are about to be used
        sizes = await images._sizes()
        assert sizes[old] > 0
        assert sizes[new] > 0
        os.utime(made.directory / "data" / "packages" / old, (0, time.time() - 3600))
        roomier = installer(made.directory, index, images_bytes=sum(sizes.values()) - 1)
        assert await images_of(roomier).collect(settled_seconds=-1) == [old]
        assert await images_of(roomier).collect(settled_seconds=-1) == []
        await roomier.aclose()
    await backend.aclose()


async def test_an_install_whose_worker_died_is_done_again_or_collected(made: Bench, index: str) -> None:
    """What a kill leaves is a container that nobody waits for; the lock went with the process."""
    backend = installer(made.directory, index)
    images = images_of(backend)

    async def broken_off() -> None:
        name = f"ma-{made.installation}-packages-{key}"
        command = ["docker", "run", "-d", "--name", name, "--label", f"managed-agents.installation={made.installation}"]
        await anyio.run_process([*command, "--label", "managed-agents.part=packages", IMAGE, "sleep", "600"])

    with anyio.fail_after(SECONDS):
        wanted = {"pip": ["madetool==2.0"]}
        key = (await backend.prepare(IMAGE, wanted)).partition(":")[2]
        await anyio.run_process(["docker", "image", "rm", f"{REPOSITORY}:{key}"])
        await broken_off()
        await backend.prepare(IMAGE, wanted)
        assert left(made.installation)["containers"] == []
        await broken_off()
        await images.collect()
        assert left(made.installation)["containers"] == []
        # One that is cancelled leaves nothing either.
        Index.asked.clear()
        async with anyio.create_task_group() as group:
            group.start_soon(backend.prepare, IMAGE, {"pip": ["slow"]})
            await until(lambda: "/simple/slow/" in Index.asked)
            group.cancel_scope.cancel()
    assert left(made.installation)["containers"] == []
    await backend.aclose()


@pytest.mark.requirement("ENV-904")
async def test_without_a_network_chosen_by_the_operator_the_error_says_so(made: Bench, index: str) -> None:
    backend = installer(made.directory, index, network=InstallSettings().network)
    Index.asked.clear()
    with anyio.fail_after(SECONDS), pytest.raises(PackagesFailed, match="the operator sets MANAGED_AGENTS_PACKAGES_NETWORK"):
        await backend.prepare(IMAGE, {"pip": ["madetool"]})
    assert not Index.asked
    await backend.aclose()


async def test_the_local_backend_refuses_packages(tmp_path: Path) -> None:
    backend = LocalBackend(data_dir=tmp_path, run_dir=tmp_path)
    assert await backend.prepare("", {"pip": []}) == ""
    with pytest.raises(PackagesFailed, match="needs the `docker` backend"):
        await backend.prepare("", {"pip": ["x"]})
    assert "packages" not in backend.capabilities


def test_tools_are_run_in_their_order_and_names_are_quoted() -> None:
    made = script(
        {"pip": ["a b; touch /x"], "apt": ["jq"], "npm": ["express@4"], "gem": ["rails:7"], "go": ["x@latest"], "cargo": ["y"]}
    )
    places = [made.index(f"managed-agents installs: {name}") for name in ("apt", "cargo", "gem", "go", "npm", "pip")]
    assert places == sorted(places)
    assert "'a b; touch /x'" in made
    done = subprocess.run(["/bin/sh", "-n", "-c", made], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
