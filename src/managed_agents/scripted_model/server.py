"""Running the scripted model: inside another program's task group, or as the command `scripted-model`."""

import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

import anyio
import click
import uvicorn

from managed_agents.scripted_model.app import create_app
from managed_agents.scripted_model.reply import ScriptError
from managed_agents.scripted_model.script import Script, load_script
from managed_agents.scripted_model.signing import DEFAULT_KEY

Started = Callable[[int], Awaitable[None]]
SHUTDOWN_SECONDS = 1


class _Server(uvicorn.Server):
    """A uvicorn server that says which port it got and leaves signals to whoever runs it."""

    def __init__(self, config: uvicorn.Config, on_started: Started | None) -> None:
        super().__init__(config)
        self._on_started = on_started

    async def startup(self, *args: object, **kwargs: object) -> None:
        await super().startup(*args, **kwargs)  # pyright: ignore[reportArgumentType]
        if self.started and self._on_started is not None:
            await self._on_started(self.servers[0].sockets[0].getsockname()[1])


def _not_a_scripted_cut(record: logging.LogRecord) -> bool:
    return "ASGI callable returned without completing response" not in record.getMessage()


async def serve(
    host: str,
    port: int,
    script: Script | None = None,
    *,
    log_requests: Path | None = None,
    signing_key: bytes = DEFAULT_KEY,
    on_started: Started | None = None,
) -> None:
    """Serve until cancelled or stopped by a signal. `on_started` is told the port (0 takes a free one)."""
    logging.getLogger("uvicorn.error").addFilter(_not_a_scripted_cut)
    config = uvicorn.Config(
        create_app(script, log_requests=log_requests, signing_key=signing_key),
        host=host,
        port=port,
        log_level="warning",
        log_config=None,
        access_log=False,
        lifespan="off",
        timeout_keep_alive=75,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        server_header=False,
        backlog=2048,
    )
    server = _Server(config, on_started)
    try:
        await server.serve()
    finally:
        if any(each.is_serving() for each in server.servers):  # cancelled: uvicorn leaves its sockets open
            with anyio.CancelScope(shield=True), anyio.move_on_after(2 * SHUTDOWN_SECONDS):
                server.force_exit = True
                await server.shutdown()


@click.command("scripted-model")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8485, show_default=True, type=click.IntRange(0, 65535), help="Port; 0 takes a free one.")
@click.option("--script", type=click.Path(path_type=Path), help="A .py or .yaml script; an echo when absent.")
@click.option("--log-requests", type=click.Path(path_type=Path), help="Append every request to this file as JSON lines.")
@click.option("--signing-key", help="Key of thinking signatures; a constant when absent.")
def scripted_model_command(host: str, port: int, script: Path | None, log_requests: Path | None, signing_key: str | None) -> None:
    """Speak the Messages API and answer as a script says: for testing agents offline."""
    try:
        loaded = load_script(script)
    except ScriptError as error:
        raise click.ClickException(str(error)) from error

    async def on_started(bound: int) -> None:
        shown = f"[{host}]" if ":" in host else host
        click.echo(f"scripted model ({loaded.name}) on http://{shown}:{bound}")

    _run(host, port, loaded, log_requests, signing_key, on_started)


def _run(
    host: str,
    port: int,
    script: Script,
    log_requests: Path | None,
    signing_key: str | None,
    on_started: Started,
) -> None:
    """Run `serve` on an event loop of its own, uvloop where there is one."""
    import asyncio

    key = signing_key.encode() if signing_key is not None else DEFAULT_KEY
    loop_factory = None
    try:
        import uvloop

        loop_factory = uvloop.new_event_loop
    except ImportError:  # not on Windows
        pass
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(serve(host, port, script, log_requests=log_requests, signing_key=key, on_started=on_started))
