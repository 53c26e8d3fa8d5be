"""The scripted model's part in the demo: a dependency audit that goes by what the commands printed.

It keeps no state of its own. What was done and found is read from the conversation, as a model would.
"""

import json
import re

from managed_agents.scripted_model import Part, Request, ToolResult, pace, text, thinking, tool_use

HOME = "/workspace/readability"
REPORT = "/mnt/session/outputs/report.md"
UNPACK = "tar -xzf /mnt/session/uploads/project.tar.gz -C /workspace && cd {home} && ls && cat requirements.txt"
VENV = "cd {home} && python3 -m venv .venv && {install}"
INSTALL = ".venv/bin/pip install --disable-pip-version-check --no-index --find-links wheelhouse -r requirements.txt"
OUTDATED = (
    "cd {home} && .venv/bin/pip list --disable-pip-version-check --outdated --no-index --find-links wheelhouse --format=json"
)
TESTS = "cd {home} && .venv/bin/python -m unittest discover -v -s tests -t . 2>&1"
RAN = re.compile(r"^Ran (\d+) tests? in .*?\n\n(OK|FAILED)(?: \((.*)\))?", re.MULTILINE)


def bash(command: str) -> Part:
    """A call of the bash tool."""
    return tool_use("bash", command=command.format(home=HOME, install=INSTALL))


def reply(request: Request) -> list[Part]:
    """Say what to do next, given everything that was done."""
    done = request.all_tool_results
    lively = pace(chars_per_second=400)
    match len(done):
        case 0:
            return [
                thinking("First I look at the project and how it pins its dependencies."),
                lively,
                text("I'll unpack the project and see what it pins."),
                bash(UNPACK),
            ]
        case 1 if not done[0].is_error:
            return [
                lively,
                text("I'll install exactly what is pinned, so that the audit starts from today."),
                bash(VENV),
            ]
        case 2 if not done[1].is_error:
            return [
                lively,
                text("Now: what is outdated, and do the tests pass as things are?"),
                bash(OUTDATED),
                bash(TESTS),
            ]
        case 1 | 2:
            return [text(f"I could not set the project up:\n\n{done[-1].text}\n\nThe audit stops here.")]
        case _:
            pass
    outdated, before = updates(done[2]), verdict(done[3])
    if not outdated or before is None or before["failed"]:
        return finish_early(done, outdated, before)
    return [lively, *bump(done[4:], outdated, before)]


def bump(done: list[ToolResult], outdated: list[dict[str, str]], before: dict[str, object]) -> list[Part]:
    """Bump the pins one edit each, install, test, report; take the pins back when the tests say so."""
    edits, rest = done[: len(outdated)], done[len(outdated) :]
    if not edits:
        return [
            text(f"The tests pass today ({before['line']}). Outdated: {listing(outdated)}. I'll bump the pin."),
            *(edit(each, back=False) for each in outdated),
        ]
    if any(each.is_error for each in edits):
        return [text(f"The pin could not be changed:\n\n{edits[-1].text}\n\nThe audit stops here.")]
    if not rest:
        return [bash(f"cd {{home}} && {{install}} && {TESTS}")]  # one call: separate ones may run side by side
    after = verdict(rest[0])
    good = after is not None and not after["failed"]
    if len(rest) == 1:
        if good:
            return [
                text(f"With the new version: {after['line'] if after else '?'}. I'll write the report."),
                tool_use("write", file_path=REPORT, content=report(outdated, before, after, kept=True)),
            ]
        return [
            text("The tests do not pass with the new version: I take the pin back and report that."),
            *(edit(each, back=True) for each in outdated),
            tool_use("write", file_path=REPORT, content=report(outdated, before, after, kept=False)),
        ]
    if rest[-1].is_error:
        return [text(f"The report could not be written:\n\n{rest[-1].text}")]
    verb = "bumped" if good else "left alone"
    return [text(f"Done. {listing(outdated)}: {verb}. The report is in {REPORT}.")]


def finish_early(done: list[ToolResult], outdated: list[dict[str, str]], before: dict[str, object] | None) -> list[Part]:
    """Nothing to bump, or nothing to trust: report that and end."""
    if len(done) > 4:
        return [text(f"Done. Nothing was changed. The report is in {REPORT}.")]
    why = "Everything is up to date." if not outdated else "The tests fail before anything was changed."
    content = f"# Dependency audit\n\n{why}\n\nTests: {before['line'] if before else 'could not be run'}\n"
    return [text(why), tool_use("write", file_path=REPORT, content=content)]


def updates(result: ToolResult) -> list[dict[str, str]]:
    """What pip found outdated, pip's own tools left aside."""
    found = re.search(r"\[.*\]", result.text, re.DOTALL)
    listed: list[dict[str, str]] = json.loads(found.group()) if found and not result.is_error else []
    return [each for each in listed if each["name"] not in {"pip", "setuptools", "wheel"}]


def verdict(result: ToolResult) -> dict[str, object] | None:
    """What a test run printed at its end; None when it did not get that far."""
    found = RAN.search(result.text.replace("\r", ""))
    if found is None:
        return None
    extra = f", {found[3]}" if found[3] else ""
    return {"failed": found[2] == "FAILED", "line": f"{found[1]} tests, {found[2]}{extra}"}


def edit(each: dict[str, str], *, back: bool) -> Part:
    """Change one pin, or take the change back."""
    old, new = f"{each['name']}=={each['version']}", f"{each['name']}=={each['latest_version']}"
    return tool_use(
        "edit",
        file_path=f"{HOME}/requirements.txt",
        old_string=new if back else old,
        new_string=old if back else new,
    )


def listing(outdated: list[dict[str, str]]) -> str:
    """Names and versions in a sentence."""
    return ", ".join(f"{each['name']} {each['version']} → {each['latest_version']}" for each in outdated)


def report(outdated: list[dict[str, str]], before: dict[str, object], after: dict[str, object] | None, *, kept: bool) -> str:
    """The report, from what was printed."""
    rows = "\n".join(
        f"| {each['name']} | {each['version']} | {each['latest_version']} | {'bumped' if kept else 'left alone'} |"
        for each in outdated
    )
    return (
        "# Dependency audit\n\n"
        f"| package | pinned | newest | result |\n|---|---|---|---|\n{rows}\n\n"
        f"- Tests before: {before['line']}\n"
        f"- Tests after: {after['line'] if after else 'could not be run'}\n\n"
        + (
            "The pins in `requirements.txt` are changed; nothing else was touched.\n"
            if kept
            else "The tests do not pass with the newest versions, so the pins are as they were.\n"
        )
    )
