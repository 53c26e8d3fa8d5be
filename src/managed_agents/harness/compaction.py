"""Compaction: the history is summarised for the model when its context is nearly full. Pure.

The log keeps everything. `agent.thread_context_compacted` is the checkpoint: its private part holds the summary, what the user
said that is not answered yet, and the folded turn, so that a new owner reads the log from there on.

The first try sends the very conversation with one instruction behind it, which a prefix cache serves almost for free. When
that does not fit, or ends without a usable text, the next try sends the conversation told as plain text, cut to fit.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import orjson

Json = dict[str, Any]

INSTRUCTION = (
    "The context of this conversation is nearly full. Do not call any tool and do not answer the user now. Write a summary "
    "that replaces the conversation so far, for yourself to go on with: what the user asked for and every constraint they "
    "gave, word for word where wording matters; what was done and found, with file paths, commands, names and figures; "
    "decisions and their reasons; what failed; what is unfinished and the next step. What the user said since your last "
    "answer will be shown to you again after the summary."
)
SUMMARY_TOKENS_MAX = 20_000
SUMMARY_CHARS_MAX = 100_000
HEAD = "The conversation so far was too long for the model's context and is replaced by this summary of it:\n\n"
GO_ON = "\n\nGo on from there."
LEFT_OUT = "\n[… {} characters left out …]\n"
RESULT_CHARS = 2_000
CALL_CHARS = 1_000
# Token counts of what is not text are guesses on the safe side.
IMAGE_TOKENS = 1_600
DOCUMENT_TOKENS = 3_000


def tokens_of(content: object) -> int:
    """Estimate the tokens of content blocks, or of any other JSON value, on the high side: three bytes a token."""
    if isinstance(content, list):
        return sum(tokens_of(block) for block in content)  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    if isinstance(content, dict):
        block: Json = content  # pyright: ignore[reportUnknownVariableType]
        source = block.get("source")
        if block.get("type") == "image":
            return IMAGE_TOKENS
        if block.get("type") == "document" and isinstance(source, Mapping) and source.get("type") != "text":  # pyright: ignore[reportUnknownMemberType]
            # A page of a PDF has about 50 kB and two thousand tokens.
            return DOCUMENT_TOKENS + len(source.get("data") or "") // 25  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]
        if block.get("type") == "tool_result":
            return 20 + tokens_of(block.get("content"))
    return len(orjson.dumps(content)) // 3 + 4


def asking(messages: Sequence[Json]) -> list[Json]:
    """The conversation with the instruction behind it."""
    instruction = {"type": "text", "text": INSTRUCTION}
    if messages and messages[-1]["role"] == "user":
        *rest, last = messages
        return [*rest, {**last, "content": [*last["content"], instruction]}]
    return [*messages, {"role": "user", "content": [instruction]}]


def asking_briefly(messages: Sequence[Json], *, chars_max: int) -> list[Json]:
    """The conversation told as text of at most about `chars_max`, the middle left out first, and the instruction."""
    told = cut_to("\n\n".join(_told(messages)), chars_max)
    return [{"role": "user", "content": [{"type": "text", "text": f"<conversation>\n{told}\n</conversation>\n\n{INSTRUCTION}"}]}]


def _told(messages: Sequence[Json]) -> Iterator[str]:
    for message in messages:
        for block in message["content"]:
            match block["type"]:
                case "text":
                    yield f"{message['role']}: {block['text']}"
                case "tool_use":
                    yield f"tool call {block['name']}: {cut_to(orjson.dumps(block['input']).decode(), CALL_CHARS)}"
                case "tool_result":
                    texts = [inner["text"] for inner in block["content"] if inner["type"] == "text"]
                    yield f"tool result: {cut_to(chr(10).join(texts), RESULT_CHARS)}"
                case "thinking" | "redacted_thinking":
                    continue
                case kind:
                    yield f"{message['role']}: ({kind})"


def cut_to(text: str, chars_max: int) -> str:
    """`text`, or its first quarter and its end with a note of what was left out between."""
    if len(text) <= chars_max:
        return text
    head, tail = chars_max // 4, chars_max - chars_max // 4
    return text[:head] + LEFT_OUT.format(len(text) - head - tail) + text[-tail:]


def is_whole(stop_reason: str | None, *, briefly: bool) -> bool:
    """Whether a response may be taken for a summary: one that was refused or cut off would stand for the history it leaves out.

    Of the brief try, which is the last, one that was cut off at its limit is better than none.
    """
    return stop_reason in ("end_turn", "stop_sequence") or (briefly and stop_reason == "max_tokens")


def summary_of(content: Sequence[Json]) -> str | None:
    """The text of a summarising response; None when there is none."""
    text = "\n\n".join(block["text"] for block in content if block["type"] == "text").strip()
    return cut_to(text, SUMMARY_CHARS_MAX) or None


def kept_of(blocks: Sequence[Json], *, tokens_max: int) -> list[Json]:
    """What the user said that is not answered yet, cut to about `tokens_max`, so that one message cannot fill the context.

    Texts are cut; images and documents beyond half of it are left out (the summary was written with them in sight).
    """
    chars_each = tokens_max * 3 // 2 // max(1, sum(block["type"] == "text" for block in blocks))
    kept: list[Json] = []
    room = tokens_max // 2
    for block in blocks:
        if block["type"] == "text":
            kept.append({**block, "text": cut_to(block["text"], chars_each)})
        elif (tokens := tokens_of(block)) <= room:
            room -= tokens
            kept.append(block)
    return kept


def opening(summary: str, *, followed: bool) -> Json:
    """The block that stands for what was summarised; `followed` by what the user said since."""
    return {"type": "text", "text": HEAD + summary + ("" if followed else GO_ON)}
