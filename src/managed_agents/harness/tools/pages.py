"""From what a server answers to what the model reads: HTML as Markdown with its links, text as it is. Pure.

Pages are written by strangers, and their conversion takes the time and memory they like: callers run this module as
a process of its own, killed at its deadline.
"""

import json
import re
import resource
import sys
from html import unescape

from html_to_markdown import ConversionOptions, convert

from managed_agents.harness.tools import charsets

TITLE_CHARS_MAX = 500
TEXT_CHARS_MAX = 8 * 1024 * 1024  # Markdown can be much longer than its HTML: nested quotations, say
MEMORY_BYTES_MAX = 1024**3
HTML_TYPES = frozenset({"text/html", "application/xhtml+xml"})
TEXT_TYPES = frozenset(
    {
        "application/json",
        "application/xml",
        "application/javascript",
        "application/x-javascript",
        "application/ecmascript",
        "application/yaml",
        "application/x-yaml",
        "application/toml",
        "application/x-ndjson",
        "application/sql",
        "application/graphql",
        "application/rtf",
        "application/x-sh",
    }
)
_TITLE = re.compile(r"<title[^>]*>(.*?)</title", re.IGNORECASE | re.DOTALL)
_DECLARED = re.compile(rb"""<meta[^>]+charset\s*=\s*["']?\s*([a-zA-Z0-9._:-]{1,40})""", re.IGNORECASE)
_DECLARATION_BYTES = 4096


def kind_of(content_type: str, body: bytes) -> str:
    """`html`, `text`, `pdf` or `other`; what names no type is judged by its first bytes."""
    if content_type == "application/pdf" or (content_type in ("", "application/octet-stream") and body.startswith(b"%PDF-")):
        return "pdf"
    if content_type in HTML_TYPES:
        return "html"
    if content_type.startswith("text/") or content_type in TEXT_TYPES or content_type.endswith(("+json", "+xml", "+yaml")):
        return "text"
    if not content_type and b"\x00" not in body[:4096]:
        return "html" if b"<html" in body[:4096].lower() or b"<!doctype html" in body[:4096].lower() else "text"
    return "other"


def decoded(body: bytes, charset: str | None, *, is_html: bool) -> str:
    """The body as text, by the header's charset or by what the page declares."""
    declared = _DECLARED.search(body[:_DECLARATION_BYTES]) if is_html else None
    return charsets.decoded(body, charset, declared[1].decode() if declared else None)


def from_html(body: bytes, charset: str | None, url: str) -> tuple[str | None, str]:
    """Title and Markdown of a page; links are absolute, what browsers do not show is left out."""
    html = decoded(body, charset, is_html=True)
    title = _TITLE.search(html)
    options = ConversionOptions(base_url=url, skip_images=True, extract_metadata=False)
    text = convert(html.encode(errors="replace").decode(), options).content or ""
    shown = " ".join(unescape(title[1]).split())[:TITLE_CHARS_MAX] if title else None
    return shown or None, text.strip()[:TEXT_CHARS_MAX]


def main() -> None:
    """Convert the page on standard input; its URL and charset are the arguments."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES_MAX, MEMORY_BYTES_MAX))
    url, charset = sys.argv[1:3]
    title, text = from_html(sys.stdin.buffer.read(), charset or None, url)
    sys.stdout.write(json.dumps([title, text]))


if __name__ == "__main__":
    main()
