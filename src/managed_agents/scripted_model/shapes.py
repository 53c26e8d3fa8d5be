"""The shape of a Messages request, field by field (spec: message_create_params.py and the *_param.py it
names).

Rules that need more than one field are in `rules.py`. Server tools (web search, code execution …) are not
simulated, so their definitions and blocks are refused as unknown: a script cannot play them.
"""

import base64
import binascii
from typing import cast

from managed_agents.scripted_model.checks import (
    Check,
    JsonObject,
    a_dict,
    anything,
    at,
    boolean,
    integer,
    list_of,
    nullable,
    number,
    one_of,
    refuse,
    shape,
    string,
    tagged,
    text_or,
)

IMAGE_BYTES_MAX = 10 * 1024 * 1024
PDF_BYTES_MAX = 32 * 1024 * 1024
MESSAGES_MAX = 100_000
TOOL_NAME = r"[a-zA-Z0-9_-]{1,128}"
TOOL_USE_ID = r"[a-zA-Z0-9_-]+"

_SIGNATURES = {
    "image/png": (b"\x89PNG\r\n\x1a\n",),
    "image/jpeg": (b"\xff\xd8\xff",),
    "image/gif": (b"GIF87a", b"GIF89a"),
    "image/webp": (b"RIFF",),
    "application/pdf": (b"%PDF-",),
}

_type: dict[str, Check] = {"type": anything}  # `tagged` has already looked at it
_cache_control = nullable(shape({"type": one_of("ephemeral")}, {"ttl": one_of("5m", "1h")}))
_cached: dict[str, Check] = {"cache_control": _cache_control}
_url = string(min_chars=1, pattern=r"https?://\S+")
_citations = nullable(list_of(a_dict))


def _not_blank(value: object, path: str) -> None:
    string()(value, path)
    text = cast("str", value)
    if not text:
        raise refuse(path.rpartition(".")[0], "text content blocks must be non-empty")
    if text.isspace():
        raise refuse(path.rpartition(".")[0], "text content blocks must contain non-whitespace text")


def _encoded(bytes_max: int, *, what: str) -> Check:
    """Check a base64 source: alphabet, size, and that the bytes are what `media_type` says."""
    media_types = [name for name in _SIGNATURES if (name == "application/pdf") == (what == "PDF")]
    fields = shape({"type": anything, "media_type": one_of(*media_types), "data": string(min_chars=1)})

    def check(value: object, path: str) -> None:
        fields(value, path)
        source = cast("dict[str, str]", value)
        try:
            data = base64.b64decode(source["data"], validate=True)
        except (binascii.Error, ValueError) as error:
            raise refuse(at(path, "data"), "invalid base64 data") from error
        if len(data) > bytes_max:
            raise refuse(path, f"{what.lower()} exceeds {bytes_max // 1024**2} MB maximum: {len(data)} bytes")
        media_type = source["media_type"]
        fits = data.startswith(_SIGNATURES[media_type]) and (media_type != "image/webp" or data[8:12] == b"WEBP")
        if not fits:
            raise refuse(path, f"{what} does not match the provided media type {media_type}, or could not be processed")

    return check


_url_source = shape({**_type, "url": _url})
_file_source = shape({**_type, "file_id": string(min_chars=1)})
_text = shape({**_type, "text": _not_blank}, {**_cached, "citations": _citations})
_image = shape(
    {
        **_type,
        "source": tagged({"base64": _encoded(IMAGE_BYTES_MAX, what="Image"), "url": _url_source, "file": _file_source}),
    },
    {**_cached, "transformations": shape({}, {"oversized_image": one_of("downsize", "error")})},
)
_text_or_image = tagged({"text": _text, "image": _image})
_document = shape(
    {
        **_type,
        "source": tagged(
            {
                "base64": _encoded(PDF_BYTES_MAX, what="PDF"),
                "text": shape({**_type, "media_type": one_of("text/plain"), "data": string(min_chars=1)}),
                "content": shape({**_type, "content": text_or(list_of(_text_or_image))}),
                "url": _url_source,
                "file": _file_source,
            }
        ),
    },
    {
        **_cached,
        "title": nullable(string(min_chars=1, max_chars=500)),
        "context": nullable(string(min_chars=1)),
        "citations": nullable(shape({}, {"enabled": boolean})),
    },
)
_only_text = tagged({"text": _text})
_search_result = shape(
    {**_type, "source": string(), "title": string(), "content": list_of(_only_text, least=1)},
    {**_cached, "citations": shape({}, {"enabled": boolean})},
)
_thinking = shape({**_type, "thinking": string(), "signature": string(min_chars=1)})
_redacted_thinking = shape({**_type, "data": string(min_chars=1)})
_caller = tagged({"direct": shape(_type)})
_tool_use = shape(
    {
        **_type,
        "id": string(pattern=TOOL_USE_ID),
        "name": string(min_chars=1, max_chars=200),
        "input": a_dict,
    },
    {**_cached, "caller": _caller, "toolset_name": nullable(string())},
)
_result_content = tagged(
    {
        "text": _text,
        "image": _image,
        "search_result": _search_result,
        "document": _document,
        "tool_reference": shape({**_type, "tool_name": string()}, _cached),
    }
)
_tool_result = shape(
    {**_type, "tool_use_id": string(pattern=TOOL_USE_ID)},
    {
        **_cached,
        "content": text_or(list_of(_result_content)),
        "is_error": boolean,
        "toolset_name": nullable(string()),
    },
)

_user_blocks: dict[str, Check] = {
    "text": _text,
    "image": _image,
    "document": _document,
    "search_result": _search_result,
    "tool_result": _tool_result,
}
_assistant_blocks: dict[str, Check] = {
    "text": _text,
    "thinking": _thinking,
    "redacted_thinking": _redacted_thinking,
    "tool_use": _tool_use,
}
_known_blocks = tagged({**_user_blocks, **_assistant_blocks})
_content = {
    "user": text_or(list_of(_known_blocks)),
    "assistant": text_or(list_of(_known_blocks)),
    "system": text_or(list_of(_only_text, least=1)),
}
_message = shape({"role": one_of("user", "assistant", "system"), "content": anything})


def _checked_message(value: object, path: str) -> None:
    _message(value, path)
    message = cast("JsonObject", value)
    role = cast("str", message["role"])
    content = message["content"]
    _content[role](content, f"{path}.content")
    if isinstance(content, str):
        return
    known = {"user": _user_blocks, "assistant": _assistant_blocks}.get(role)
    for index, block in enumerate(cast("list[JsonObject]", content)):
        if known is not None and block["type"] not in known:
            raise refuse(f"{path}.content.{index}", f"`{block['type']}` blocks can not be in `{role}` messages")


def _input_schema(value: object, path: str) -> None:
    a_dict(value, path)
    schema = cast("JsonObject", value)
    if "type" not in schema:
        raise refuse(at(path, "type"), "Field required")
    one_of("object")(schema["type"], at(path, "type"))
    _subschema(schema, path)


def _subschema(value: object, path: str) -> None:
    """Check what draft 2020-12 makes structurally wrong in the keywords that tools really use."""
    if isinstance(value, bool):
        return
    if not isinstance(value, dict):
        raise refuse(path, "JSON schema is invalid. It must match JSON Schema draft 2020-12")
    schema = cast("JsonObject", value)
    for keyword, inner in _KEYWORDS.items():
        if keyword in schema and schema[keyword] is not None:
            inner(schema[keyword], at(path, keyword))


def _properties(value: object, path: str) -> None:
    a_dict(value, path)
    for name, inner in cast("JsonObject", value).items():
        _subschema(inner, at(path, name))


def _json_type(value: object, path: str) -> None:
    for name in cast("list[object]", value) if isinstance(value, list) else [value]:
        one_of("object", "array", "string", "number", "integer", "boolean", "null")(name, path)


_KEYWORDS: dict[str, Check] = {
    "type": _json_type,
    "properties": _properties,
    "required": list_of(string()),
    "items": _subschema,
    "enum": list_of(anything),
    "anyOf": list_of(_subschema, least=1),
    "oneOf": list_of(_subschema, least=1),
    "allOf": list_of(_subschema, least=1),
    "description": string(),
    "$defs": _properties,
}

_custom_tool = shape(
    {"name": string(pattern=TOOL_NAME), "input_schema": _input_schema},
    {
        **_cached,
        "type": nullable(one_of("custom")),
        "description": string(),
        "strict": boolean,
        "eager_input_streaming": nullable(boolean),
        "defer_loading": boolean,
        "input_examples": list_of(a_dict),
        "allowed_callers": list_of(one_of("direct")),
    },
)


def _tool(value: object, path: str) -> None:
    kind = cast("JsonObject", value).get("type") if isinstance(value, dict) else None
    if kind not in (None, "custom"):
        raise refuse(path, f"Input tag '{kind}' is not served by the scripted model; only custom tools are")
    _custom_tool(cast("object", value), f"{path}.custom")


_display: dict[str, Check] = {"display": nullable(one_of("summarized", "omitted"))}
_parallel: dict[str, Check] = {"disable_parallel_tool_use": boolean}
_shared: dict[str, Check] = {
    **_cached,
    "speed": nullable(one_of("standard", "fast")),
    "system": text_or(list_of(_only_text)),
    "thinking": tagged(
        {
            "enabled": shape({**_type, "budget_tokens": integer(least=1024)}, _display),
            "adaptive": shape(_type, _display),
            "disabled": shape(_type),
            "between_tools": shape(_type),
        }
    ),
    "tool_choice": tagged(
        {
            "auto": shape(_type, _parallel),
            "any": shape(_type, _parallel),
            "tool": shape({**_type, "name": string(min_chars=1)}, _parallel),
            "none": shape(_type),
        }
    ),
    "tools": list_of(_tool),
    "output_config": shape({}, {"effort": nullable(one_of("low", "medium", "high", "xhigh", "max"))}),
}
_asked: dict[str, Check] = {
    "model": string(min_chars=1, max_chars=256),
    "messages": list_of(_checked_message, least=1, most=MESSAGES_MAX),
}
create_request = shape(
    {**_asked, "max_tokens": integer(least=0)},
    {
        **_shared,
        "stream": boolean,
        "metadata": shape({}, {"user_id": nullable(string(max_chars=256))}),
        "service_tier": one_of("auto", "standard_only"),
        "inference_geo": nullable(string()),
        "stop_sequences": list_of(string(min_chars=1)),
        "temperature": number(least=0, most=1),
        "top_p": number(least=0, most=1),
        "top_k": integer(least=0),
    },
)
count_tokens_request = shape(_asked, _shared)
