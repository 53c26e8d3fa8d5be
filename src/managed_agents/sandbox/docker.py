"""The `docker` backend: one hardened container a sandbox, the runner as its main process, no engine call
per tool call.

The engine's labels are the list of sandboxes; this process keeps none. A worker that dies in the midst of
`provision` leaves a container without the `ready` mark in its directory: the next `provision` makes it
anew, the collector removes it.
"""

import hashlib
import json
import shutil
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import aiodocker
import aiohttp
import anyio
import anyio.to_thread
from aiodocker.containers import DockerContainer

from managed_agents.sandbox import disk, layout, uids
from managed_agents.sandbox.backend import (
    Capability,
    Known,
    Labelled,
    Packages,
    SandboxError,
    SandboxGone,
    SandboxKey,
    SandboxSpec,
    remove_each,
)
from managed_agents.sandbox.client import RunnerClient
from managed_agents.sandbox.container import (
    EGRESS_DIRECTORY,
    LABEL,
    MOUNTS,
    Sources,
    binds_of,
    command_of,
    container_of,
    is_sandbox,
    labelled_of,
    labels_of,
)
from managed_agents.sandbox.handle import RunnerSandbox
from managed_agents.sandbox.package_hosts import PROBE, PROBE_SECONDS_MAX
from managed_agents.sandbox.packages import InstallSettings, PackageImages, installs

ENGINE_SECONDS = 60.0
NO_ENGINE = 900  # the library's status where there was no connection
PROBE_STALE_SECONDS = 3 * PROBE_SECONDS_MAX

DiskMode = Literal["auto", "loop", "volume"]


@asynccontextmanager
async def _engine(what: str) -> AsyncGenerator[None]:
    """Bound a request to the engine and translate its failures."""
    try:
        with anyio.fail_after(ENGINE_SECONDS):
            yield
    except aiodocker.DockerError as error:
        if error.status == NO_ENGINE:
            raise SandboxError(f"the engine does not answer ({what})") from error
        raise SandboxError(f"the engine failed to {what}: {error.message}") from error
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        raise SandboxError(f"the engine does not answer ({what}): {type(error).__name__}: {error}") from error


class DockerBackend:
    """Sandboxes as containers of the local engine."""

    def __init__(
        self,
        *,
        installation: str,
        data_dir: Path,
        run_dir: Path,
        uid_base: int = 64000,
        runtime: str | None = None,
        disk_mode: DiskMode = "auto",
        installs: InstallSettings | None = None,
    ) -> None:
        """`installation` keeps several on one engine apart. `disk_mode` "auto": sized disks as root, else
        volumes.
        """
        self._installation = installation
        self._data_dir, self._run_dir = data_dir, run_dir
        self._uid_base, self._runtime = uid_base, runtime
        self._sized = disk.supported() if disk_mode == "auto" else disk_mode == "loop"
        self._installs = installs or InstallSettings()
        self._docker: aiodocker.Docker | None = None

    @property
    def capabilities(self) -> frozenset[Capability]:
        every: tuple[Capability, ...] = ("isolation", "network", "memory", "pids", "cpus", "packages", "pause")
        return frozenset({*every, "disk"} if self._sized else every)

    @property
    def _client(self) -> Any:  # the library's annotations are partial
        if self._docker is None:
            self._docker = aiodocker.Docker()
        return self._docker

    async def aclose(self) -> None:
        if self._docker is not None:
            await self._docker.close()
            self._docker = None

    def _places(self, id: str, generation: int) -> layout.Places:  # noqa: A002
        return layout.places(self._data_dir, self._run_dir, id, generation)

    def _handle(self, id: str, generation: int) -> RunnerSandbox:  # noqa: A002
        places = self._places(id, generation)
        host = _ContainerHost(self, id, generation)
        return RunnerSandbox(id, generation, RunnerClient(places.socket), host)

    def container_name(self, id: str, generation: int) -> str:  # noqa: A002
        """Return the name of the container, unique in the engine."""
        return f"ma-{self._installation}-{layout.key(id, generation)}"

    # making

    @property
    def _images(self) -> PackageImages:
        directory = self._data_dir / "packages"
        return PackageImages(self._client, installation=self._installation, directory=directory, settings=self._installs)

    async def prepare(self, image: str, packages: Packages) -> str:
        return await self._images.ready(image, packages) if installs(packages) else image

    async def collect_images(self) -> None:
        await self._images.collect()
        await self._collect_probes()

    async def _collect_probes(self) -> None:
        """Remove the containers that asked an image something and whose process died before it had the answer."""
        labels = [f"{LABEL}.installation={self._installation}", f"{LABEL}.part={PROBE}"]
        async with _engine("remove a container"):
            for container in await self._client.containers.list(all=1, filters=json.dumps({"label": labels})):
                if time.time() - container["Created"] > PROBE_STALE_SECONDS:
                    await container.delete(force=True)

    async def provision(self, spec: SandboxSpec) -> RunnerSandbox:
        places = self._places(spec.id, spec.generation)
        handle = self._handle(spec.id, spec.generation)
        if (places.home / "ready").exists():
            try:
                await self.start(spec.id, spec.generation)
            except SandboxGone:
                pass  # it died since it was made, and never got a call: another takes its place
            else:
                return handle
        await self.remove(spec.id, spec.generation)
        places.home.mkdir(parents=True, mode=0o711)
        uid = self._uid_base + uids.take(self._data_dir, places.home)
        await self._prepare(places, spec, uid)
        async with _engine("create a container"):
            found = (await self._client.images.inspect(spec.image))["Config"]
            container = await self._client.containers.create(
                self._container(spec, places, uid, found.get("Env") or []), name=self.container_name(spec.id, spec.generation)
            )
            await container.start()
        await handle.hello()
        (places.home / "ready").touch()
        return handle

    async def _prepare(self, places: layout.Places, spec: SandboxSpec, uid: int) -> None:
        places.run.mkdir(parents=True)
        places.run.chmod(0o2770)
        if spec.network == "gateway":
            _make_egress(places)
        if self._sized:
            places.state.mkdir(mode=0o700)
            await disk.create(places.home / "disk.img", spec.limits.disk_bytes)
            await disk.mount(places.home / "disk.img", places.home / "disk")
            layout.make_tree(places.home / "disk", uid)
        else:
            await self._prepare_volumes(spec, uid)

    def _volume(self, id: str, generation: int, name: str) -> str:  # noqa: A002
        return f"{self.container_name(id, generation)}-{name}"

    async def _prepare_volumes(self, spec: SandboxSpec, uid: int) -> None:
        """Make volumes and, because only the engine may write to them, have a short-lived container own
        them out.
        """
        script = (
            "cd /volumes && chmod 755 workspace home memory session && chmod 1777 tmp && chmod 700 state && "
            "cd session && mkdir uploads skills outputs tool_outputs && "
            f"chown {uid}:{uid} outputs tool_outputs ../workspace ../home"
        )
        names = [*MOUNTS, "state"]
        binds = [f"{self._volume(spec.id, spec.generation, name)}:/volumes/{name}" for name in names]
        async with _engine("prepare volumes"):
            for name in names:
                labels = labels_of(spec, self._installation)
                await self._client.volumes.create({"Name": self._volume(spec.id, spec.generation, name), "Labels": labels})
            container = await self._client.containers.create(
                {
                    "Image": spec.image,
                    "Cmd": ["/bin/sh", "-ec", script],
                    "Labels": {**labels_of(spec, self._installation), f"{LABEL}.part": "volumes"},
                    "HostConfig": {
                        "Binds": binds,
                        "NetworkMode": "none",
                        "CapDrop": ["ALL"],
                        "CapAdd": ["CHOWN"],
                    },
                }
            )
            try:
                await container.start()
                ended = await container.wait()
            finally:
                with anyio.CancelScope(shield=True):
                    await container.delete(force=True)
        if ended["StatusCode"] != 0:
            raise SandboxError(f"preparing volumes failed with status {ended['StatusCode']}")

    def _container(self, spec: SandboxSpec, places: layout.Places, uid: int, image_env: Sequence[str]) -> dict[str, Any]:
        code = layout.install_runner(self._data_dir)
        if self._sized:
            mounts = {name: str(places.home / "disk" / name) for name in MOUNTS}
            sources = Sources(mounts, str(places.state), code, "rw")
        else:
            mounts = {name: self._volume(spec.id, spec.generation, name) for name in MOUNTS}
            # Else the engine would give an empty volume the owner its directory has in the image.
            sources = Sources(mounts, self._volume(spec.id, spec.generation, "state"), code, "rw,nocopy")
        return container_of(
            spec,
            command_of(spec, uid, image_env, sized=self._sized),
            labels=labels_of(spec, self._installation),
            binds=binds_of(spec, places, sources),
            runtime=self._runtime,
        )

    # finding

    async def find(self, id: str, generation: int) -> DockerContainer | None:  # noqa: A002
        """Return the container, None when there is none."""
        try:
            async with _engine("look up a container"):
                found: DockerContainer = await self._client.containers.get(self.container_name(id, generation))
                return found
        except SandboxError as error:
            if isinstance(error.__cause__, aiodocker.DockerError) and error.__cause__.status == 404:
                return None
            raise

    async def start(self, id: str, generation: int) -> None:  # noqa: A002
        """Start a stopped or paused container and wait for its runner. Raises: SandboxGone."""
        container = await self.find(id, generation)
        if container is None:
            raise SandboxGone(f"no container for {layout.key(id, generation)}")
        if not container["State"]["Running"]:
            places = self._places(id, generation)
            places.run.mkdir(parents=True, exist_ok=True)
            places.run.chmod(0o2770)
            if any(mount["Destination"] == EGRESS_DIRECTORY for mount in container["Mounts"]):
                _make_egress(places)
            if self._sized:
                await disk.mount(places.home / "disk.img", places.home / "disk")
            async with _engine("start a container"):
                await self._client.containers.container(container.id).start()
        elif container["State"]["Paused"]:
            await self._resume(id, generation)
        handle = self._handle(id, generation)
        await handle.hello()
        await handle.aclose()

    async def attach(self, id: str) -> RunnerSandbox:  # noqa: A002
        generations = [found.generation for found in await self._all(id)]
        if not generations:
            raise SandboxGone(f"no sandbox {id}")
        await self.start(id, max(generations))
        return self._handle(id, max(generations))

    async def _all(self, id: str) -> Sequence[Labelled]:  # noqa: A002
        return [found for found in await self._list(f"{LABEL}.sandbox={id}") if found.id == id]

    async def pause(self, id: str) -> None:  # noqa: A002
        running = [found for found in await self._all(id) if found.running]
        if not running:
            raise SandboxGone(f"no sandbox {id} runs")
        for found in running:
            if not found.paused:
                async with _engine("pause a container"):
                    await self._client.containers.container(self.container_name(found.id, found.generation)).pause()

    async def resume(self, id: str) -> None:  # noqa: A002
        for found in await self._all(id):
            if found.paused:
                await self._resume(found.id, found.generation)

    async def _resume(self, id: str, generation: int) -> None:  # noqa: A002
        try:
            async with _engine("resume a container"):
                await self._client.containers.container(self.container_name(id, generation)).unpause()
        except SandboxError:
            # Somebody else may have been first.
            container = await self.find(id, generation)
            if container is not None and container["State"]["Paused"]:
                raise

    async def halt(self, id: str) -> bool:  # noqa: A002
        found = await self._all(id)
        for each in found:
            await self.end(each.id, each.generation)
        return bool(found)

    async def end(self, id: str, generation: int) -> None:  # noqa: A002
        """Stop a container, or nothing where it does not run, and unmount its disk, so that it holds no loop device."""
        container = await self.find(id, generation)
        if container is not None:
            if container["State"]["Paused"]:
                await self._resume(id, generation)  # else it could not end by itself
            async with _engine("stop a container"):
                await container.stop(t=2)
        await disk.unmount(self._places(id, generation).home / "disk")

    async def list(self) -> Sequence[Labelled]:
        return await self._list()

    async def _list(self, *labels: str) -> Sequence[Labelled]:
        filters = {"label": [f"{LABEL}.installation={self._installation}", *labels]}
        async with _engine("list containers"):
            containers = await self._client.containers.list(all=1, filters=json.dumps(filters))
        return [labelled_of(container) for container in containers if is_sandbox(container["Labels"])]

    # removing

    async def remove(self, id: str, generation: int) -> None:  # noqa: A002
        """Remove container, mount, disk and socket. Repeating is safe."""
        places = self._places(id, generation)
        (places.home / "ready").unlink(missing_ok=True)
        container = await self.find(id, generation)
        if container is not None:
            async with _engine("remove a container"):
                await container.delete(force=True, v=True)
        await disk.unmount(places.home / "disk")
        await self._remove_volumes(id, generation)
        for path in (places.home, places.run):
            if path.exists():
                await anyio.to_thread.run_sync(shutil.rmtree, path)

    async def _remove_volumes(self, id: str, generation: int) -> None:  # noqa: A002
        if self._sized:
            return
        # One that made volumes ready when its worker died still holds them.
        ours = [f"{LABEL}.installation={self._installation}", f"{LABEL}.sandbox={id}", f"{LABEL}.generation={generation}"]
        async with _engine("remove a container"):
            filters = json.dumps({"label": [*ours, f"{LABEL}.part=volumes"]})
            for left in await self._client.containers.list(all=1, filters=filters):
                await left.delete(force=True)
        for name in (*MOUNTS, "state"):
            async with _engine("remove a volume"):
                try:
                    volume = await self._client.volumes.get(self._volume(id, generation, name))
                    await volume.delete()
                except aiodocker.DockerError as error:
                    if error.status != 404:
                        raise

    async def collect_orphans(self, known: Known) -> Sequence[SandboxKey]:
        found = {(labelled.id, labelled.generation) for labelled in await self.list()}
        # Directories whose container is gone, or was never made.
        for parent in (self._data_dir / "sandboxes", self._run_dir):
            if parent.exists():
                found |= {split for path in parent.iterdir() if (split := split_key(path.name)) is not None}
        return await remove_each(sorted(found - await known()), self.remove)


def _make_egress(places: layout.Places) -> None:
    """Make the directory in which the egress gateway will listen. Repeating is safe."""
    places.egress.mkdir(exist_ok=True)
    places.egress.chmod(0o755)


def split_key(name: str) -> tuple[str, int] | None:
    """Return id and generation of a directory's name, None for what is not a sandbox's."""
    id, dot, generation = name.rpartition(".")  # noqa: A001
    return (id, int(generation)) if dot and id and generation.isdigit() else None


class _ContainerHost:
    """`Host` of a container."""

    def __init__(self, backend: DockerBackend, id: str, generation: int) -> None:  # noqa: A002
        self._backend, self._id, self._generation = backend, id, generation

    async def death(self) -> str | None:
        container = await self._backend.find(self._id, self._generation)
        if container is None:
            return "the container is gone"
        state: Mapping[str, Any] = container["State"]
        if state["Paused"]:
            # Whoever pauses makes sure that nobody uses it; an engine that is slow may do it when that is not true any more.
            await self._backend.resume(self._id)
        if state["Running"] or state["Status"] == "created":
            return None
        memory = ", out of memory" if state["OOMKilled"] else ""
        return f"the container ended with status {state['ExitCode']}{memory}"

    async def stop(self) -> None:
        await self._backend.end(self._id, self._generation)

    async def destroy(self) -> None:
        await self._backend.remove(self._id, self._generation)


def installation_of(data_dir: Path) -> str:
    """Return a short name that keeps the containers of several installations on one engine apart."""
    return hashlib.sha256(str(data_dir).encode()).hexdigest()[:12]
