"""Scripts in YAML: the first rule that matches a request answers it.

Everything is checked when the script is loaded, unknown words included, so that a typo is an error message
and not a rule that never applies. Decisions depend on the request alone, but for `times`, which counts.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import yaml

from managed_agents.scripted_model import reply as helpers
from managed_agents.scripted_model.checks import (
    JsonObject,
    Refused,
    a_dict,
    anything,
    integer,
    list_of,
    nullable,
    number,
    shape,
    string,
    text_or,
)
from managed_agents.scripted_model.reply import Part, ScriptError
from managed_agents.scripted_model.request import Request

_HOLE = re.compile(r"\$\{([^}]*)\}")
_REQUEST_NAMES = ("last_user_text", "tool_result", "turn", "round", "model")

_seconds = number(least=0, most=86_400)
_status = integer(least=400)
_fail = shape({"status": _status}, {"message": string(min_chars=1), "retry_after": _seconds})
CONDITIONS = {
    "last_user_contains": string(min_chars=1),
    "last_user_matches": string(min_chars=1),
    "tool_result_contains": string(min_chars=1),
    "tool_result_matches": string(min_chars=1),
    "tool_results_count": integer(least=0),
    "tool_offered": string(min_chars=1),
    "system_contains": string(min_chars=1),
    "model": string(min_chars=1),
    "turn": integer(least=1),
    "round": integer(least=0),
    "attempt": integer(least=1),
    "judging": string(min_chars=1),
}
_ITEM = shape(
    {},
    {
        "text": string(min_chars=1),
        "thinking": string(min_chars=1),
        "tool_use": shape({"name": string(min_chars=1)}, {"input": a_dict}),
        "broken_tool_use": shape({"name": string(min_chars=1), "raw": string()}),
        "stall": _seconds,
        "pace": shape(
            {},
            {
                "chars_per_second": number(least=0.01, most=1e9),
                "seconds_per_delta": number(least=0, most=600),
            },
        ),
        "cut": anything,
        "fail": _fail,
        "refuse": nullable(shape({}, {"category": string(), "explanation": string()})),
        "stop_reason": string(),
    },
)
_RULE = shape(
    {},
    {
        "when": shape({}, CONDITIONS),
        "reply": text_or(list_of(text_or(_ITEM), least=1)),
        "error": _fail,
        "delay": _seconds,
        "times": integer(least=1),
    },
)
_SCRIPT = shape({"rules": list_of(_RULE, least=1)}, {"max_input_tokens": integer(least=1)})


@dataclass(frozen=True, slots=True)
class _Rule:
    key: str
    when: JsonObject
    patterns: dict[str, re.Pattern[str]]
    items: list[object]
    delay_seconds: float
    times: int | None

    def match(self, request: Request) -> dict[str, str] | None:
        """Return what the holes of the reply are filled with, or None when the rule does not apply."""
        if (request.judging is None) != ("judging" not in self.when):
            # Rules are about the agent's own requests, unless they say otherwise.
            return None
        results = "\n".join(result.text for result in request.tool_results)
        facts: JsonObject = {
            "tool_results_count": len(request.tool_results),
            "model": request.model,
            "turn": request.turn,
            "round": request.round,
            "attempt": request.attempt,
        }
        contained = {
            "last_user_contains": request.last_user_text,
            "tool_result_contains": results,
            "system_contains": request.system,
        }
        filling = {"last_user_text": request.last_user_text, "tool_result": results, "model": request.model}
        filling |= {"turn": str(request.turn), "round": str(request.round)}
        for name, wanted in self.when.items():
            if name in self.patterns:
                searched = request.last_user_text if name == "last_user_matches" else results
                found = self.patterns[name].search(searched)
                if found is None:
                    return None
                filling["0"] = found[0]
                filling |= {str(i): group or "" for i, group in enumerate(found.groups(), 1)}
                filling |= {group: value or "" for group, value in found.groupdict().items()}
            elif name in contained:
                if cast("str", wanted) not in contained[name]:
                    return None
            elif name == "tool_offered":
                if wanted not in request.tools:
                    return None
            elif name == "judging":
                if request.judging is None or wanted not in ("any", request.judging.tool):
                    return None
            elif facts[name] != wanted:
                return None
        if self.times is not None and request.count(self.key) > self.times:
            return None
        return filling


def load_yaml(source: str, name: str) -> tuple[Callable[[Request], object], int | None]:
    """Return the reply function and the context limit of a YAML script. Raises: ScriptError."""
    try:
        document: object = yaml.safe_load(source)
        _SCRIPT(document, "")
    except yaml.YAMLError as error:
        raise ScriptError(f"{name}: {error}") from error
    except Refused as error:
        raise ScriptError(f"{name}: {error.message}") from error
    script = cast("JsonObject", document)
    rules = [_rule(f"{name}: rules.{i}", each) for i, each in enumerate(cast("list[JsonObject]", script["rules"]))]

    def reply(request: Request) -> list[Part]:
        for rule in rules:
            filling = rule.match(request)
            if filling is not None:
                parts = [helpers.stall(rule.delay_seconds)] if rule.delay_seconds else []
                return [
                    *parts,
                    *(_part(cast("JsonObject | str", _filled(item, filling))) for item in rule.items),
                ]
        if request.judging is not None:
            return [helpers.text("ALLOW")]
        raise ScriptError(f"{name}: no rule matches; the user said {request.last_user_text[:200]!r}")

    return reply, cast("int | None", script.get("max_input_tokens"))


def _rule(path: str, rule: JsonObject) -> _Rule:
    when = cast("JsonObject", rule.get("when") or {})
    if ("reply" in rule) == ("error" in rule):
        raise ScriptError(f"{path}: a rule has either a reply or an error")
    patterns: dict[str, re.Pattern[str]] = {}
    for name in ("last_user_matches", "tool_result_matches"):
        if name in when:
            try:
                patterns[name] = re.compile(cast("str", when[name]), re.MULTILINE)
            except re.error as error:
                raise ScriptError(f"{path}.when.{name}: {error}") from error
    known = {*_REQUEST_NAMES, *(["0"] if patterns else [])}
    for pattern in patterns.values():
        known |= {str(i + 1) for i in range(pattern.groups)} | set(pattern.groupindex)
    reply = rule.get("reply")
    items: list[object] = [reply] if isinstance(reply, str) else []
    items += cast("list[object]", reply) if isinstance(reply, list) else []
    items += [{"fail": rule["error"]}] if "error" in rule else []
    for index, item in enumerate(items):
        _check_item(f"{path}.reply.{index}", item, known)
    return _Rule(
        key=path,
        when=when,
        patterns=patterns,
        items=items,
        delay_seconds=float(cast("float", rule.get("delay") or 0)),
        times=cast("int | None", rule.get("times")),
    )


def _check_item(path: str, item: object, known: set[str]) -> None:
    if isinstance(item, dict) and len(cast("JsonObject", item)) != 1:
        raise ScriptError(f"{path}: one word an item")
    for hole in _holes(cast("object", item)):
        if hole not in known:
            raise ScriptError(
                f"{path}: ${{{hole}}} is neither a group of the rule's pattern nor one of {', '.join(_REQUEST_NAMES)}"
            )
    _part(cast("JsonObject | str", item))


def _holes(value: object) -> set[str]:
    if isinstance(value, str):
        return set(_HOLE.findall(value))
    if isinstance(value, dict):
        return {hole for inner in cast("JsonObject", value).values() for hole in _holes(inner)}
    if isinstance(value, list):
        return {hole for inner in cast("list[object]", value) for hole in _holes(inner)}
    return set()


def _filled(value: object, filling: dict[str, str]) -> object:
    if isinstance(value, str):
        return _HOLE.sub(lambda hole: filling[hole[1]], value)
    if isinstance(value, dict):
        return {name: _filled(inner, filling) for name, inner in cast("JsonObject", value).items()}
    if isinstance(value, list):
        return [_filled(inner, filling) for inner in cast("list[object]", value)]
    return value


def _part(item: JsonObject | str) -> Part:
    if isinstance(item, str):
        return helpers.text(item)
    ((word, value),) = item.items()
    fields = cast("dict[str, str]", value) if isinstance(value, dict) else {}
    match word:
        case "text":
            return helpers.text(cast("str", value))
        case "thinking":
            return helpers.thinking(cast("str", value))
        case "tool_use":
            return helpers.ToolUse(fields["name"], cast("JsonObject", cast("JsonObject", value).get("input") or {}))
        case "broken_tool_use":
            return helpers.broken_tool_use(fields["name"], fields["raw"])
        case "stall":
            return helpers.stall(cast("float", value))
        case "pace":
            return helpers.pace(**cast("dict[str, float]", value))
        case "cut":
            return helpers.cut(value if isinstance(value, int) and not isinstance(value, bool) else None)
        case "fail":
            error = cast("JsonObject", value)
            return helpers.fail(
                cast("int", error["status"]),
                cast("str | None", error.get("message")),
                retry_after=cast("float | None", error.get("retry_after")),
            )
        case "refuse":
            return helpers.refuse(fields.get("category"), fields.get("explanation"))
        case _:
            return helpers.stop_reason(cast("str", value))
