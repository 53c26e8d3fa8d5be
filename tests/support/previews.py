"""What holds for every stream that shows previews, whatever happened to the processes behind it."""

from collections.abc import Sequence
from typing import Any

from anthropic.lib.sessions import accumulate_managed_agents_event


def check_previews(events: Sequence[Any]) -> dict[str, str]:
    """Check every promise on one stream; returns the previewed texts by event id."""
    previewed: dict[str, str] = {}
    snapshot: Any = None
    started: list[str] = []
    over: set[str] = set()
    asking = False
    for event in events:
        snapshot = accumulate_managed_agents_event(snapshot, event)  # raises on a hole or a delta without start
        match event.type:
            case "span.model_request_start":
                asking = True
            case "span.model_request_end":
                asking = False
                over |= set(started)
            case "event_start":
                assert asking
                assert event.event.id not in started
                assert set(event.to_dict()) == {"type", "event"}
                started.append(event.event.id)
                if event.event.type == "agent.message":
                    previewed[event.event.id] = ""
            case "event_delta":
                assert event.event_id not in over
                assert set(event.to_dict()) == {"type", "event_id", "delta"}
                assert event.delta.type == "content_delta"
                previewed[event.event_id] += event.delta.content.text
            case "agent.message":
                said = "".join(block.text for block in event.content)
                assert said.startswith(previewed.get(event.id, ""))
                over.add(event.id)
            case "agent.thinking":
                over.add(event.id)
            case _:
                pass
    return previewed
