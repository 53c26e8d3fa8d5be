"""The built-in script: a friendly echo, and a few commands so that a message can say what the model does.

One command a line; each `run` or `tool` ends a response and waits for its result, the others happen on the
way:

    run: ls -l              call the bash tool
    tool: read {"path":…}   call any tool with a JSON input
    say: …    think: …      text and thinking
    wait: 2                 seconds of silence
    error: 529              answer the first try with this status, the retry normally
    refuse                  end with stop reason `refusal`
    judge: deny             how the calls of this conversation are judged (permission policy `auto`); else they are allowed

"""

import re
from typing import cast

import orjson

from managed_agents.scripted_model.checks import JsonObject
from managed_agents.scripted_model.reply import Part, fail, refuse, stall, text, thinking, tool_use
from managed_agents.scripted_model.request import Request

_COMMAND = re.compile(r"\s*(?:(run|tool|say|think|wait|error|judge)\s*:\s*(.+)|(refuse)\s*)", re.IGNORECASE)

_JUDGE = re.compile(r"\bjudge\s*:\s*(\w+)", re.IGNORECASE)


def reply(request: Request) -> list[Part]:
    """Answer one request."""
    if request.judging is not None:
        told = _JUDGE.findall(request.last_user_text)
        return [text(told[-1].upper() if told else "ALLOW")]
    commands = _commands(request.last_user_text)
    if not commands:
        return [
            thinking("The user said something; I say it back."),
            text(f"You said: {request.last_user_text or '(nothing)'}"),
        ]
    rounds: list[list[tuple[str, str]]] = [[]]
    for command in commands:
        rounds[-1].append(command)
        if command[0] in ("run", "tool"):
            rounds.append([])
    now = rounds[request.round] if request.round < len(rounds) else []
    parts = [part for name, argument in now for part in _part(name, argument, request)]
    if request.round >= len(rounds) - 1 and not any(name in ("say", "refuse") for name, _ in now):
        results = request.tool_results
        parts.append(text(f"Done. The last tool said:\n{results[-1].text}" if results else "Done."))
    return parts


def _commands(said: str) -> list[tuple[str, str]]:
    matches = [_COMMAND.fullmatch(line) for line in said.splitlines() if line.strip()]
    if not matches or not all(matches):
        return []
    return [((m[1] or m[3]).lower(), (m[2] or "").strip()) for m in matches if m is not None]


def _part(name: str, argument: str, request: Request) -> list[Part]:
    match name:
        case "run":
            return [tool_use("bash", command=argument)]
        case "tool":
            tool, _, raw = argument.partition(" ")
            return [tool_use(tool, **_json_object(raw))]
        case "say":
            return [text(argument)]
        case "think":
            return [thinking(argument)]
        case "wait":
            return [stall(float(argument))] if re.fullmatch(r"\d+(\.\d+)?", argument) else [text("wait: needs a number")]
        case "judge":
            return []
        case "error":
            status = int(argument) if re.fullmatch(r"[45]\d\d", argument) else 500
            return [fail(status)] if request.attempt == 1 else []
        case _:
            return [refuse(explanation="The message told me to refuse.")]


def _json_object(raw: str) -> JsonObject:
    try:
        value: object = orjson.loads(raw or "{}")
    except orjson.JSONDecodeError:
        return {"input": raw}
    return cast("JsonObject", value) if isinstance(value, dict) else {"input": value}
