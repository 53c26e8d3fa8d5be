"""A program written for an SDK from before 1.0. It runs one whole session and prints what it saw as JSON.

It is given a server by BASE_URL and API_KEY, what exists already by the other variables, and knows nothing of this server.
"""

import json
import os
from typing import Any

import anthropic

KEY = os.environ["API_KEY"]
BETA = "managed-agents-2026-04-01"
sent: list[dict[str, Any]] = []


class Recording(anthropic.Anthropic):
    """The SDK, which also notes how it asked."""

    def _prepare_request(self, request: Any) -> None:
        sent.append(
            {
                "method": request.method,
                "path": request.url.path,
                "beta": request.url.params.get("beta"),
                "key": request.headers.get("x-api-key") == KEY and "authorization" not in request.headers,
                "version": request.headers.get("anthropic-version"),
            }
        )


client = Recording(base_url=os.environ["BASE_URL"], api_key=KEY, max_retries=0)
beta = client.beta

agent = beta.agents.create(
    name="older", model="claude-opus-4-6", system=os.environ["SYSTEM"], tools=[{"type": "agent_toolset_20260401"}]
)
renamed = beta.agents.update(agent.id, version=agent.version, name="older still")
versions = [each.version for each in beta.agents.versions.list(agent.id)]

upload = beta.files.upload(file=("notes.txt", b"from an older client", "text/plain"))
session = beta.sessions.create(
    agent=agent.id,
    environment_id=os.environ["ENVIRONMENT_ID"],
    title="older",
    resources=[{"type": "file", "file_id": upload.id, "mount_path": "/notes.txt"}],
)
seen: list[str] = []
said: list[str] = []
with beta.sessions.events.stream(session.id) as stream:
    beta.sessions.events.send(session.id, events=[{"type": "user.message", "content": [{"type": "text", "text": "go"}]}])
    for event in stream:
        seen.append(event.type)
        if event.type in ("agent.message", "agent.tool_result"):
            said += [block.text for block in event.content]
        if event.type == "session.status_idle":
            break
listed = [event.type for event in beta.sessions.events.list(session.id)]

# What its files looked like then: a page is an id, not a cursor.
first = beta.files.list(limit=1, scope_id=session.id, betas=[BETA])
rest = beta.files.list(limit=1, scope_id=session.id, after_id=first.last_id, betas=[BETA])

# And what everybody does whose SDK lacks a method.
raw = client.get(f"/v1/sessions/{session.id}?beta=true", cast_to=object, options={"headers": {"anthropic-beta": BETA}})
posted = client.post(
    f"/v1/sessions/{session.id}?beta=true",
    cast_to=object,
    body={"metadata": {"from": "post"}},
    options={"headers": {"anthropic-beta": BETA}},
)
try:
    beta.sessions.retrieve("sesn_01unknown")
    refused = "nothing"
except anthropic.NotFoundError as error:
    refused = type(error).__name__ + " " + error.body["error"]["type"]

archived = beta.sessions.archive(session.id)
deleted = beta.sessions.delete(session.id)
report = {
    "sdk": anthropic.__version__,
    "sent": sent,
    "versions": versions,
    "name": renamed.name,
    "streamed": seen,
    "listed": listed,
    "said": said,
    "files": [[file.filename for file in first.data], first.has_more, [file.filename for file in rest.data], rest.has_more],
    "raw": raw["id"] == session.id,
    "posted": posted["metadata"],
    "refused": refused,
    "archived": archived.archived_at is not None,
    "deleted": deleted.to_dict() == {"id": session.id, "type": "session_deleted"},
}
print(json.dumps(report))
