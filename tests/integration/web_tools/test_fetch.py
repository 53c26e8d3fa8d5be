"""`web_fetch` against real servers: what it reads, and where it does not go."""

import base64
import codecs
import json
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import anyio
import pytest

from managed_agents.core import addresses
from managed_agents.harness.tools import charsets, guarded_http, pages
from managed_agents.harness.tools.guarded_http import GuardedClient
from managed_agents.harness.tools.web_fetch import WebError, WebFetch
from tests.support.waiting import until
from tests.support.websites import PDF, Names, website

pytestmark = pytest.mark.anyio
LOOPBACK = addresses.networks("127.0.0.0/8,::1/128")


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def site() -> AsyncIterator[str]:
    async with website() as url:
        yield url


async def no_urls(_sources: dict[str, Any]) -> set[str]:
    return set()


async def fetch(url: str, *, client: GuardedClient | None = None, **config: Any) -> Any:
    """Fetch where loopback is allowed; returns the only block."""
    tool = WebFetch(client or GuardedClient(exceptions=LOOPBACK))
    (block,) = await tool.run({"url": url}, config, no_urls)
    return block


async def refused(url: str, code: str, *, client: GuardedClient | None = None, **config: Any) -> str:
    with pytest.raises(WebError) as error:
        await fetch(url, client=client, **config)
    assert str(error.value).startswith(f"{code}: "), str(error.value)
    return str(error.value)


@pytest.mark.requirement("WEB-101")
@pytest.mark.parametrize(
    ("name", "shown", "absent"),
    [
        ("html", "# Heading", "evil"),
        ("html", "Title: A & B", "hidden"),
        ("latin", "café", "\ufffd"),
        ("text", "plain words", ""),
        ("json", '{"a": 1}', ""),
        ("gzip", "unpacked", ""),
        ("empty", "(no text on this page)", ""),
        ("nested", "(no text on this page)", ""),
    ],
)
async def test_pages_become_text(site: str, name: str, shown: str, absent: str) -> None:
    block = await fetch(f"{site}/page/{name}")
    assert block["type"] == "text"
    assert block["text"].startswith(f"URL: {site}/page/{name}\n")
    assert shown in block["text"]
    assert not absent or absent not in block["text"]


async def typed(site: str, content_type: str, body: bytes, times: int = 1) -> str:
    """What is shown of a body with that content type."""
    query = urlencode({"type": content_type, "hex": body.hex(), "times": times})
    return str((await fetch(f"{site}/typed?{query}"))["text"]).partition("\n\n")[2]


@pytest.mark.requirement("WEB-114")
@pytest.mark.parametrize(
    ("charset", "body", "shown"),
    [
        ("utf-8", "é".encode(), "é"),
        ("UTF8", "é".encode(), "é"),
        ("iso-8859-1", b"\x80\xe9", "€é"),  # as browsers do
        ("Shift_JIS", "日本".encode("cp932"), "日本"),
        ("gb2312", "中文".encode("gb18030"), "中文"),
        ("koi8-r", "да".encode("koi8_r"), "да"),
        ("utf-16", "é".encode("utf-16-le"), "é"),
        ("utf-16le", b"a\x00\x00\xd8b\x00", "a\ufffdb"),
        ("windows-1253", b"a\xffb", "a\ufffdb"),
        ("utf-8", b"\xff\xfea\x00", "a"),  # its byte order mark knows better
        # No character encodings, whatever the interpreter thinks: read as UTF-8, or as old pages are.
        ("undefined", b"plain", "plain"),
        ("idna", b"xn--a..b", "xn--a..b"),
        ("punycode", "é-1".encode(), "é-1"),
        ("unicode_escape", b"\\ud800", "\\ud800"),
        ("utf-7", b"+AGE-", "+AGE-"),
        ("rot13", b"caf\xe9!", "café!"),
        ("nonsense", b"caf\xe9!", "café!"),
    ],
)
async def test_only_character_encodings_are_read(site: str, charset: str, body: bytes, shown: str) -> None:
    assert await typed(site, f"text/plain; charset={charset}", body) == shown


@pytest.mark.requirement("WEB-114")
async def test_text_is_decoded_beside_the_other_sessions(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, others_went_on, real = threading.Event(), threading.Event(), pages.decoded

    def decoded(body: bytes, charset: str | None, *, is_html: bool) -> str:
        begun.set()
        assert others_went_on.wait(30), "the event loop waits for the decoder"
        return real(body, charset, is_html=is_html)

    monkeypatch.setattr(pages, "decoded", decoded)
    async with anyio.create_task_group() as group:

        async def go_on() -> None:
            await until(begun.is_set)
            others_went_on.set()

        group.start_soon(go_on)
        assert await typed(site, "text/plain; charset=windows-874", b"\xa1") == "ก"


@pytest.mark.requirement("WEB-114")
@pytest.mark.parametrize("charset", ["punycode", "windows-874", "utf-8"])
def test_no_decoder_holds_the_interpreter_for_more_than_a_piece(charset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread helps the others only between two calls of it. Quadratic ones are not used at all."""
    used: list[tuple[str, int]] = []
    real = codecs.getincrementaldecoder

    def noting(encoding: str) -> Any:
        class Noting(real(encoding)):
            def decode(self, input: Any, final: bool = False) -> str:  # noqa: A002 - the base's name
                used.append((encoding, len(input)))
                return super().decode(input, final)

        return Noting

    monkeypatch.setattr(codecs, "getincrementaldecoder", noting)
    body = b"\xff" * (2 * 1024 * 1024)
    assert charsets.decoded(body, charset)
    by_piece = [(encoding, size) for encoding, size in used if encoding != "utf_8" or charset == "utf-8"]
    assert max(size for _, size in by_piece) <= charsets.PIECE_BYTES
    assert {encoding for encoding, _ in used} <= {"cp874", "cp1252", "utf_8"}


async def test_the_conversion_is_told_nothing_of_its_worker(site: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # What converts pages here says what it was told instead.
    program = tmp_path / "converter"
    program.write_text(f"#!{sys.executable}\nimport json, os\nprint(json.dumps([None, json.dumps(dict(os.environ))]))\n")
    program.chmod(0o755)
    monkeypatch.setenv("MANAGED_AGENTS_DATABASE_URL", "postgresql://user:secret@db/agents")
    monkeypatch.setenv("ANTHROPIC_API_KEY", "secret")
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    monkeypatch.setattr(sys, "executable", str(program))
    told = json.loads(await typed(site, "text/html", b"<p>"))
    assert told["LC_ALL"] == "C.UTF-8"
    assert set(told) <= {"LC_ALL", "LANG", "TZ", "LD_LIBRARY_PATH", "LC_CTYPE"}  # the last is the interpreter's own


async def test_links_are_absolute(site: str) -> None:
    assert f"[a link]({site}/next?x=1)" in (await fetch(f"{site}/page/html"))["text"]


async def test_a_pdf_is_a_document(site: str) -> None:
    block = await fetch(f"{site}/page/pdf")
    assert (block["type"], block["source"]["media_type"]) == ("document", "application/pdf")
    assert base64.b64decode(block["source"]["data"]) == PDF
    await refused(f"{site}/page/no-pdf", "unsupported_content_type")


@pytest.mark.requirement("WEB-102")
async def test_text_is_cut_at_the_tokens_allowed(site: str) -> None:
    text = (await fetch(f"{site}/page/long", max_content_tokens=100))["text"]
    assert 400 < len(text) < 700
    assert "100 tokens" in text
    assert "tokens" not in (await fetch(f"{site}/page/html", max_content_tokens=1000))["text"]


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("/page/nothing", "url_not_accessible"),
        ("/status/500", "url_not_accessible"),
        ("/status/429", "too_many_requests"),
        ("/page/image", "unsupported_content_type"),
        ("/page/brotli", "unsupported_content_type"),
        ("/page/broken-gzip", "url_not_accessible"),
        ("/endless?type=application/pdf", "content_too_large"),
    ],
)
async def test_trouble_has_a_code(site: str, path: str, code: str) -> None:
    await refused(f"{site}{path}", code)


@pytest.mark.requirement("WEB-103")
@pytest.mark.parametrize("path", ["/endless", "/page/bomb"])
async def test_huge_bodies_are_cut(site: str, path: str) -> None:
    text = (await fetch(f"{site}{path}"))["text"]
    assert len(text) < 2 * 1024 * 1024 + 1000
    assert "Only the first 2097152 bytes" in text


@pytest.mark.requirement("WEB-103")
async def test_slow_bodies_are_given_up(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guarded_http, "FETCH_SECONDS_MAX", 0.5)
    assert "within" in await refused(f"{site}/slow", "url_not_accessible")


@pytest.mark.requirement("WEB-104")
@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1", "localhost", "LOCALHOST", "0x7f000001", "2130706433", "127.1", "0", "[::1]", "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]", "[0:0:0:0:0:ffff:127.0.0.1]", "[::]", "169.254.169.254", "[fe80::1]", "①②⑦.⓪.⓪.①",
        "127。0。0。1", "user:pass@127.0.0.1", "127.0.0.1#@example.com", "example.com@127.0.0.1",
    ],
)  # fmt: skip
async def test_nothing_inside_is_reached_however_it_is_written(site: str, host: str) -> None:
    port = urlsplit(site).port
    with pytest.raises(WebError, match=r"^(url_not_allowed|url_not_accessible): "):
        await fetch(f"http://{host}:{port}/page/text", client=GuardedClient())


@pytest.mark.parametrize(
    "url", ["ftp://example.com/", "file:///etc/passwd", "//example.com/", "http://", "http:///x", "gopher://x", "http://a b/",
            "http://example.com/\r\nx: y", "http://[::1/", "javascript:1", "http://example.com:99999/", "http://xn--/",
            "https://xn--a.example.com/", "http://xn--0.xn--0/"],
)  # fmt: skip
async def test_only_http_urls_are_fetched(url: str) -> None:
    await refused(url, "url_not_allowed")


async def test_wrong_input_is_told() -> None:
    tool = WebFetch(GuardedClient())
    for arguments in ({}, {"url": 5}, {"url": " "}):
        with pytest.raises(WebError, match=r"^invalid_tool_input"):
            await tool.run(arguments, {}, no_urls)
    with pytest.raises(WebError, match=r"^url_too_long"):
        await tool.run({"url": "http://example.com/" + "x" * 3000}, {}, no_urls)


@pytest.mark.requirement("WEB-104")
async def test_redirects_are_checked_one_by_one(site: str) -> None:
    port = urlsplit(site).port
    names = Names(public_test=[["127.0.0.1"]], inside_test=[["127.0.0.2"]])
    # Of the two loopback addresses that the names mean, only one is allowed here.
    client = GuardedClient(exceptions=addresses.networks("127.0.0.1/32"), resolver=names)
    block = await fetch(f"http://public.test:{port}/page/text", client=client)
    assert "plain words" in block["text"]
    for inside in (f"http://inside.test:{port}/page/text", f"http://127.0.0.2:{port}/", f"//inside.test:{port}/page/text"):
        await refused(f"http://public.test:{port}/redirect?to={inside}", "url_not_allowed", client=client)
    await refused(f"http://public.test:{port}/redirect?to=ftp://public.test/", "url_not_allowed", client=client)
    for broken in ("http://xn--/", "//xn--a.test/", "https://xn--0.xn--0/x"):
        await refused(f"http://public.test:{port}/redirect?to={broken}", "url_not_allowed", client=client)
    again = await fetch(f"http://public.test:{port}/redirect?to=/page/text%23part", client=client)
    assert again["text"].startswith(f"URL: http://public.test:{port}/page/text\n")
    assert "redirects" in await refused(f"http://public.test:{port}/loop", "url_not_accessible", client=client)


@pytest.mark.requirement("WEB-105")
async def test_a_name_that_changes_its_mind_gains_nothing(site: str) -> None:
    port = urlsplit(site).port
    names = Names(rebind_test=[["127.0.0.1"], ["127.0.0.2"]])
    client = GuardedClient(exceptions=addresses.networks("127.0.0.1/32"), resolver=names)
    block = await fetch(f"http://rebind.test:{port}/page/injection", client=client)
    assert f"rebind.test:{port}" in block["text"]
    assert names.asked == ["rebind.test"]  # asked once: what was checked is what was connected to
    await refused(f"http://rebind.test:{port}/page/text", "url_not_allowed", client=client)


async def test_of_several_addresses_only_allowed_ones_are_used(site: str) -> None:
    port = urlsplit(site).port
    names = Names(mixed_test=[["10.0.0.1", "127.0.0.1"]])
    client = GuardedClient(exceptions=addresses.networks("127.0.0.1/32"), resolver=names)
    assert "plain words" in (await fetch(f"http://mixed.test:{port}/page/text", client=client))["text"]


async def test_nobody_answers() -> None:
    names = Names(dead_test=[["127.0.0.2"]])
    client = GuardedClient(exceptions=LOOPBACK, resolver=names)
    await refused("http://dead.test:9/", "url_not_accessible", client=client)
    await refused("http://unknown.test/", "url_not_accessible", client=client)


@pytest.mark.requirement("WEB-106")
@pytest.mark.parametrize(
    ("config", "host", "allowed"),
    [
        ({"allowed_domains": ["example.com"]}, "example.com", True),
        ({"allowed_domains": ["example.com"]}, "docs.example.com", True),
        ({"allowed_domains": ["Example.com/"]}, "DOCS.EXAMPLE.COM", True),
        ({"allowed_domains": ["www.example.com"]}, "example.com", False),
        ({"allowed_domains": ["example.com"]}, "badexample.com", False),
        ({"allowed_domains": ["example.com"]}, "example.com.evil.com", False),
        ({"blocked_domains": ["example.com"]}, "docs.example.com", False),
        ({"blocked_domains": ["example.com"]}, "example.com.", False),
        ({"blocked_domains": ["example.com"]}, "example.org", True),
    ],
)
async def test_domain_rules(site: str, config: dict[str, Any], host: str, allowed: bool) -> None:
    port = urlsplit(site).port

    async def here(_host: str, _port: int) -> list[str]:
        return ["127.0.0.1"]

    client = GuardedClient(exceptions=LOOPBACK, resolver=here)
    url = f"http://{host}:{port}/page/text"
    if allowed:
        assert "plain words" in (await fetch(url, client=client, **config))["text"]
        if "allowed_domains" in config:
            other = f"{url.replace('/page/text', '/redirect')}?to=http://other.org:{port}/page/text"
            await refused(other, "url_not_allowed", client=client, **config)
    else:
        await refused(url, "url_not_allowed", client=client, **config)


async def test_only_urls_of_the_conversation(site: str) -> None:
    url = f"{site}/page/text"
    tool = WebFetch(GuardedClient(exceptions=LOOPBACK))

    async def seen(sources: dict[str, Any]) -> set[str]:
        assert sources == {"user_input": {"type": "all"}}
        return {url}

    config = {"url_sources": {"user_input": {"type": "all"}}}
    assert await tool.run({"url": f"{url}#part"}, config, seen)
    with pytest.raises(WebError, match=r"^url_not_in_prior_context"):
        await tool.run({"url": f"{site}/page/html"}, config, seen)
