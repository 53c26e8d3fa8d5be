"""Text that is too much for the model: kept whole in a file of the sandbox, shown as a beginning, an end and the path.

Runs in a child with the commands' uid.
"""

from __future__ import annotations

import os
import secrets

from .config import Config
from .toolerror import reason

CHARS_MAX = 100_000  # spec: above this the model gets a preview and a path
HEAD_CHARS = 48 * 1024
TAIL_CHARS = 16 * 1024


def shown(name: str, text: str, config: Config) -> str:
    """Return `text`, or its preview when it is too long."""
    if len(text) <= CHARS_MAX:
        return text
    path = f"{config.spill}/{name}-{secrets.token_hex(8)}.txt"
    try:
        fd = os.open(config.resolve(path), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        with os.fdopen(fd, "wb") as file:
            file.write(text.encode(errors="surrogateescape"))
        where = f"the full output is in {path}"
    except OSError as error:
        # The call did its work; the model is told that only the preview is left.
        where = f"the full output could not be kept ({reason(error)})"
    return f"{text[:HEAD_CHARS]}\n\n[output of {len(text)} characters shortened; {where}]\n\n{text[-TAIL_CHARS:]}"
