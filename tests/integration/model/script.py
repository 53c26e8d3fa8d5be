"""The script behind the model client's tests: what the user says selects what goes wrong."""

from managed_agents.scripted_model import (
    Request,
    broken_tool_use,
    cut,
    fail,
    pace,
    refuse,
    stall,
    text,
    thinking,
    tool_use,
)

FAILURES = {"rate": 429, "overloaded": 529, "server": 500, "gateway": 504, "billing": 402, "auth": 401,
            "forbidden": 403, "large": 413, "unprocessable": 422}  # fmt: skip
REPLIES = {
    "all blocks": [
        thinking("Let me look."),
        text("I will look."),
        tool_use("bash", command="ls", deep={"a": [1, None]}),
    ],
    "broken input": [text("go"), broken_tool_use("bash", '{"command": "ls'), broken_tool_use("bash", "[1]")],
    "refuse": [text("no"), refuse("bio", "No.")],
    "stall first": [stall(600), text("never")],
    "stall inside": [text("half"), stall(600), text("never")],
    "cut first": [cut()],
    "cut inside": [text("half"), cut()],
    "event overloaded": [text("half"), fail(529)],
    "event rate": [text("half"), fail(429)],
    "event invalid": [text("half"), fail(400, "bad")],
    "event too long": [text("half"), fail(400, "prompt is too long: 9 tokens > 8 maximum")],
    "event api": [text("half"), fail(500)],
    "slow": [pace(seconds_per_delta=0.05), text("0123456789abcdef" * 200)],
}


def reply(request: Request) -> object:
    said = request.last_user_text
    if said in FAILURES:
        return fail(FAILURES[said], f"scripted {said} for key {'sk-secret-key'}", retry_after=3)
    if said == "headers":
        return text(" ".join(sorted(f"{name}={value}" for name, value in request.headers.items())))
    return REPLIES.get(said, f"You said: {said}")
