"""Scripts in YAML: what a rule matches, what fills its holes, and that a typo is found when the script is
loaded."""

from collections import Counter
from pathlib import Path
from typing import Any

import orjson
import pytest

from managed_agents.scripted_model import Request, ScriptError, load_script
from managed_agents.scripted_model.reply import Cut, End, Fail, Pace, Stall, Text, Thinking, ToolUse, parts_of
from managed_agents.scripted_model.request import JUDGING
from managed_agents.scripted_model.yaml_script import load_yaml


def request(said: str = "hi", result: str | None = None, *, attempt: int = 1, counts: Counter[str] | None = None) -> Request:
    messages: list[dict[str, Any]] = [{"role": "user", "content": said}]
    if result is not None:
        messages.append({"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "bash", "input": {}}]})
        messages.append({"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": result}]})
    kept = counts if counts is not None else Counter[str]()

    def count(key: str) -> int:
        kept[key] += 1
        return kept[key]

    body = {
        "model": "claude-opus-5",
        "messages": messages,
        "tools": [{"name": "bash"}],
        "system": "Be brief.",
    }
    return Request(body, {}, attempt, count)


def answer(rules: str, asked: Request) -> list[Any]:
    reply, _ = load_yaml("rules:\n" + rules, "s")
    return parts_of(reply(asked))


def test_every_word_of_a_reply() -> None:
    rules = """
  - reply:
      - a plain string
      - thinking: hm
      - tool_use: {name: bash, input: {command: ls, n: 3}}
      - broken_tool_use: {name: bash, raw: "{"}
      - stall: 2
      - pace: {seconds_per_delta: 0.5}
      - refuse: {category: bio, explanation: no}
      - stop_reason: max_tokens
      - cut: 3
      - cut:
      - fail: {status: 429, retry_after: 1}
    delay: 1.5
"""
    parts = answer(rules.replace("explanation: no", "explanation: 'no'"), request())
    assert parts == [
        Stall(1.5),
        Text("a plain string"),
        Thinking("hm"),
        ToolUse("bash", {"command": "ls", "n": 3}),
        ToolUse("bash", {}, "{"),
        Stall(2),
        Pace(0.5, 16),
        End("refusal", {"type": "refusal", "category": "bio", "explanation": "no"}),
        End("max_tokens"),
        Cut(3),
        Cut(None),
        Fail(429, "This request would exceed your rate limit", "rate_limit_error", 1),
    ]


@pytest.mark.parametrize(
    ("when", "asked", "matches"),
    [
        ("last_user_contains: audit", request("the audit"), True),
        ("last_user_contains: audit", request("hi"), False),
        ("last_user_matches: '^(\\d+)$'", request("12"), True),
        ("last_user_matches: '^(\\d+)$'", request("x12"), False),
        ("tool_result_contains: passed", request(result="3 passed"), True),
        ("tool_result_contains: passed", request(result="3 failed"), False),
        ("tool_result_matches: '(\\d+) passed'", request(result="3 passed"), True),
        ("tool_result_matches: '(\\d+) passed'", request(), False),
        ("tool_results_count: 1", request(result="x"), True),
        ("tool_results_count: 0", request(result="x"), False),
        ("round: 1", request(result="x"), True),
        ("round: 0", request(result="x"), False),
        ("turn: 1", request(), True),
        ("turn: 2", request(), False),
        ("attempt: 2", request(attempt=2), True),
        ("attempt: 2", request(), False),
        ("tool_offered: bash", request(), True),
        ("tool_offered: web_search", request(), False),
        ("system_contains: brief", request(), True),
        ("system_contains: long", request(), False),
        ("model: claude-opus-5", request(), True),
        ("model: claude-opus-4-8", request(), False),
    ],
)
def test_when_a_rule_applies(when: str, asked: Request, matches: bool) -> None:
    found = answer(f"  - when: {{{when}}}\n    reply: rule\n  - reply: other\n", asked)
    assert found == [Text("rule" if matches else "other")]


def judging(tool: str, command: str) -> Request:
    call = {"instructions": "", "conversation": [], "call": {"tool": tool, "input": {"command": command}}}
    said = {"role": "user", "content": orjson.dumps(call).decode()}
    body: dict[str, Any] = {"model": "m", "max_tokens": 9, "system": f"{JUDGING} …", "messages": [said]}
    return Request(body, {}, 1, lambda _key: 1)


def test_only_rules_about_judging_answer_a_judge_and_without_them_all_is_allowed() -> None:
    assert answer("  - reply: other\n", judging("bash", "ls")) == [Text("ALLOW")]
    rules = """
  - when: {judging: bash, last_user_contains: "rm "}
    reply: deny
  - when: {judging: any}
    reply: unsure
  - reply: other
"""
    assert answer(rules, judging("bash", "rm -rf /")) == [Text("deny")]
    assert answer(rules, judging("bash", "ls")) == [Text("unsure")]
    assert answer(rules, judging("write", "rm ")) == [Text("unsure")]
    assert answer(rules, request()) == [Text("other")]


def test_groups_fill_holes() -> None:
    rule = """
  - when: {tool_result_matches: '(?P<done>\\d+) passed, (\\d+) failed'}
    reply:
      - tool_use: {name: bash, input: {command: "echo ${done} ${2} ${0}", list: ["${turn}"]}}
      - "${last_user_text} / ${model}"
"""
    parts = answer(rule, request("go", "3 passed, 4 failed"))
    assert parts[0].input == {"command": "echo 3 4 3 passed, 4 failed", "list": ["1"]}
    assert parts[1] == Text("go / claude-opus-5")


def test_times_counts_for_the_whole_life_of_the_script() -> None:
    counts = Counter[str]()
    rules = "  - error: {status: 529}\n    times: 2\n  - reply: fine\n"
    replies = [answer(rules, request(counts=counts))[0] for _ in range(3)]
    assert [type(each) for each in replies] == [Fail, Fail, Text]


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("rules: []", "at least 1"),
        ("rule: []", "rules: Field required"),
        ("rules: [{when: {said: x}, reply: a}]", "rules.0.when.said: Extra"),
        ("rules: [{reply: [{say: a}]}]", "rules.0.reply.0.say: Extra"),
        ("rules: [{reply: [{text: a, stall: 1}]}]", "one word an item"),
        ("rules: [{reply: '${1}'}]", "neither a group"),
        ("rules: [{when: {last_user_matches: '('}, reply: a}]", "last_user_matches"),
        ("rules: [{reply: a, error: {status: 500}}]", "either a reply or an error"),
        ("rules: [{when: {turn: 1}}]", "either a reply or an error"),
        ("rules: [{reply: [{stop_reason: bored}]}]", "stop_reason"),
        ("rules: [{reply: [{refuse: {category: taste}}]}]", "category"),
        ("rules: [{reply: [{pace: {}}]}]", "pace"),
        ("rules: [", "flow"),
    ],
)
def test_typos_are_found_when_loading(source: str, wanted: str) -> None:
    with pytest.raises(ScriptError, match=wanted):
        load_yaml(source, "s")


def test_no_matching_rule_is_said() -> None:
    with pytest.raises(ScriptError, match="no rule matches"):
        answer("  - when: {turn: 9}\n    reply: a\n", request())


def test_files_are_loaded_by_their_ending(tmp_path: Path) -> None:
    for name, content, wanted in [
        ("a.py", "X = 1", "no function"),
        ("b.py", "MAX_INPUT_TOKENS = 'x'\ndef reply(r): ...", "not a number"),
        ("c.txt", "", "a script is"),
    ]:
        (tmp_path / name).write_text(content)
        with pytest.raises(ScriptError, match=wanted):
            load_script(tmp_path / name)
    with pytest.raises(ScriptError, match="no such file"):
        load_script(tmp_path / "absent.py")
    (tmp_path / "d.yaml").write_text("max_input_tokens: 500\nrules: [{reply: a}]")
    assert load_script(tmp_path / "d.yaml").max_input_tokens == 500
