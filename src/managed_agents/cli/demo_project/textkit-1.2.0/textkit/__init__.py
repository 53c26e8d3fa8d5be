"""Words and slugs."""

import re

__version__ = "1.2.0"


def count_words(text: str) -> int:
    """How many words `text` has."""
    return len(text.split())


def slug(text: str) -> str:
    """`text` as part of an address."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
