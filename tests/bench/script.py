"""The model of the benches: it answers at once, except where a section asks for more by its first word."""

from managed_agents.scripted_model import Part, Request, stall, text, tool_use

ROUNDS = 30
STALL_SECONDS = 60.0


def reply(request: Request) -> list[Part]:
    asked = request.user_texts[0]
    if asked.startswith("Rounds") and sum(message["role"] == "assistant" for message in request.messages) < ROUNDS:
        return [tool_use("bash", command="true")]
    if asked.startswith("Wait"):
        return [stall(STALL_SECONDS), text("ok")]
    return [text("ok")]
