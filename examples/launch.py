"""What the examples share: bring an agent up to its declaration, give it files and a task, follow it, fetch what it made.

Declarations are the bodies of the create calls. Applying one again changes nothing; a changed one becomes a new version.
"""

import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from anthropic import Anthropic

BETA = "managed-agents-2026-04-01"


def connect() -> Anthropic:
    """A client of the server that BASE_URL and API_KEY name. Without BASE_URL: what `make serve` starts."""
    return Anthropic(base_url=os.environ.get("BASE_URL", "http://127.0.0.1:8484"), api_key=os.environ["API_KEY"])


def apply(resource: Any, declaration: Path) -> str:
    """Create what the file declares, or update the one of its name; returns its id."""
    declared = yaml.safe_load(declaration.read_text())
    existing = _named(resource.list(), declared["name"])
    return resource.update(existing.id, **declared).id if existing else resource.create(**declared).id


def _named(listed: Iterable[Any], name: str) -> Any:
    return next((each for each in listed if each.name == name), None)


def work(folder: Path, task: str, files: Mapping[str, bytes]) -> dict[str, str]:
    """Run one session of the agent declared in `folder`; returns the texts it left in /mnt/session/outputs, by name."""
    client = connect()
    agent = apply(client.beta.agents, folder / "agent.yaml")
    environment = apply(client.beta.environments, folder / "environment.yaml")
    uploads = {path: client.beta.files.upload(file=(Path(path).name, content)) for path, content in files.items()}
    session = client.beta.sessions.create(
        agent=agent,
        environment_id=environment,
        title=folder.name,
        resources=[{"type": "file", "file_id": file.id, "mount_path": path} for path, file in uploads.items()],
    )
    _follow(client, session.id, task)
    outputs = client.beta.files.list(scope_id=session.id, betas=[BETA])
    return {file.filename: client.beta.files.download(file.id).read().decode() for file in outputs if file.downloadable}


def _follow(client: Anthropic, session_id: str, task: str) -> None:
    """Send the task and tell what happens until the agent rests. The stream is opened first, so nothing is missed."""
    with client.beta.sessions.events.stream(session_id) as stream:
        content: Any = [{"type": "text", "text": task}]
        client.beta.sessions.events.send(session_id, events=[{"type": "user.message", "content": content}])
        for event in stream:
            match event.type:
                case "agent.message":
                    _say("".join(block.text for block in event.content if block.type == "text"))
                case "agent.tool_use":
                    _say(f"[{event.name}] {next(iter(event.input.values()), '')}".split("\n")[0])
                case "session.error":
                    _say(f"error: {event.error.message}")
                case "session.status_idle":
                    if event.stop_reason.type != "end_turn":
                        sys.exit(f"the session stopped: {event.stop_reason.type}")
                    return
                case _:
                    pass
    sys.exit("the stream ended before the agent was done")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
