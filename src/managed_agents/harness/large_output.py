"""Text that is too much for the model, of tools that the harness runs itself: kept whole in a file of the sandbox. Pure."""

from typing import Any

from managed_agents.core import limits

Json = dict[str, Any]

HEAD_CHARS = 48 * 1024
TAIL_CHARS = 16 * 1024


def is_large(block: Json) -> bool:
    """Whether the model gets only a preview of this content block."""
    return block["type"] == "text" and len(block["text"]) > limits.SPILL_CHARS


def preview(text: str, path: str | None) -> str:
    """The beginning and the end of `text`, and where the whole of it is."""
    where = "the full output could not be kept" if path is None else f"the full output is in {path}"
    return f"{text[:HEAD_CHARS]}\n\n[output of {len(text)} characters shortened; {where}]\n\n{text[-TAIL_CHARS:]}"
