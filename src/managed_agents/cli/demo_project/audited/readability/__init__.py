"""How long a text takes to read."""

import tabulo
import textkit

WORDS_PER_MINUTE = 220


def reading_seconds(text: str) -> int:
    """Seconds an adult needs for `text`."""
    return round(textkit.count_words(text) * 60 / WORDS_PER_MINUTE)


def report(texts: dict[str, str]) -> str:
    """A table of texts, their words and reading times."""
    rows = [[title, textkit.count_words(text), f"{reading_seconds(text)} s"] for title, text in texts.items()]
    return tabulo.table(["text", "words", "reading time"], rows)


def address(title: str) -> str:
    """The address under which a text is published."""
    return f"/texts/{textkit.slug(title)}"
