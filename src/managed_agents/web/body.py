"""Request bodies: bounded while they stream in, strict JSON, storable text, then a closed pydantic model.

Everything that Postgres or a later encoding would choke on (NUL, unpaired surrogates, numbers beyond 64
bits, deep nesting) is refused here with the path of the field, so that no layer below has to think of it.
"""

import json
import math
from typing import Any, TypeVar, cast

import orjson
from pydantic import BaseModel, TypeAdapter, ValidationError
from starlette.requests import Request

from managed_agents.core import limits
from managed_agents.core.errors import InvalidRequest, TooLarge
from managed_agents.web import intake, jsonscan
from managed_agents.web.errors import PATH_PART_CHARS_MAX, from_validation

DEPTH_MAX = limits.BODY_DEPTH_MAX
VALUES_MAX = limits.BODY_VALUES_MAX
INT_MAX = 2**63 - 1


T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)


def validated(document: Any, adapter: TypeAdapter[T]) -> T:
    """Return `document` as the type of `adapter`. Raises `InvalidRequest` naming the offending field."""
    try:
        return adapter.validate_python(document)
    except ValidationError as error:
        raise from_validation(error, document, root="body") from error


async def parse(request: Request, model: type[M]) -> M:
    """Read the body and validate it as `model`.

    Raises `InvalidRequest` naming the offending field, `TooLarge` above 32 MB.
    """
    return validated(await read_json(request), TypeAdapter(model))


async def none(request: Request) -> None:
    """Read the body of a call that takes none: absent or an empty object."""
    raw = await read(request, limits.BODY_BYTES_MAX)
    if not raw.strip():
        return
    fields = loads(raw)
    if not isinstance(fields, dict):
        raise InvalidRequest("body: Input should be an object")
    if fields:
        name = str(next(iter(cast(dict[str, Any], fields))))[:PATH_PART_CHARS_MAX]
        raise InvalidRequest(f"{name}: Extra inputs are not permitted")


async def read(request: Request, bytes_max: int) -> bytes:
    """Return the raw body, at most `bytes_max` long; what has arrived is counted, whatever the headers
    say.
    """
    check_encoding(request)
    check_length(request, bytes_max)
    chunks: list[bytes] = []
    total = 0
    async for chunk in intake.chunks(request):
        total += len(chunk)
        if total > bytes_max:
            raise too_large(bytes_max)
        intake.hold(request, total)
        chunks.append(chunk)
    return b"".join(chunks)


def check_encoding(request: Request) -> None:
    """Refuse compressed bodies."""
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise InvalidRequest(
            "content-encoding: compressed request bodies are not supported",
            error_code="request_body_encoding_unsupported",
        )


def check_length(request: Request, bytes_max: int) -> None:
    """Refuse a body whose declared length is above `bytes_max` before reading any of it."""
    declared = request.headers.get("content-length", "")
    if declared.isascii() and declared.isdigit() and int(declared[:20]) > bytes_max:
        raise too_large(bytes_max)


def too_large(bytes_max: int) -> TooLarge:
    """Return the error for a body above `bytes_max`."""
    return TooLarge(f"Request exceeds the maximum size of {bytes_max // (1024 * 1024)} MB")


async def read_json(request: Request) -> Any:
    """Read the body as JSON, whatever its shape."""
    kind, _, parameters = request.headers.get("content-type", "").partition(";")
    if kind.strip().lower() != "application/json":
        raise InvalidRequest("content-type: must be application/json")
    charset = parameters.strip().lower().removeprefix("charset=").strip('"')
    if charset not in ("", "utf-8", "utf8"):
        raise InvalidRequest("content-type: charset must be utf-8", error_code="request_body_encoding_invalid")
    return loads(await read(request, limits.BODY_BYTES_MAX))


def loads(raw: bytes) -> Any:
    """Decode JSON and check that all of it can be stored and encoded again."""
    if not raw.strip():
        raise InvalidRequest("body: a JSON object is required")
    try:
        written = jsonscan.count_keys(raw, values_max=VALUES_MAX)
        document = orjson.loads(raw)
    except jsonscan.TooManyValues as error:
        raise _too_many_values() from error
    except orjson.JSONDecodeError as error:
        raise _decode_error(raw, error) from error
    if check_storable(document) != written:
        key = jsonscan.repeated_key(raw.decode())[:PATH_PART_CHARS_MAX]
        raise InvalidRequest(f"{key or 'body'}: the key is given more than once in an object")
    return document


def _too_many_values() -> InvalidRequest:
    return InvalidRequest(f"body: more than {VALUES_MAX} values")


def _decode_error(raw: bytes, error: orjson.JSONDecodeError) -> InvalidRequest:
    """Say where it broke. An unpaired surrogate is legal JSON text, so its field can be named."""
    message = f"body: invalid JSON at line {error.lineno} column {error.colno}"
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        return InvalidRequest("body: not valid UTF-8", error_code="request_body_encoding_invalid")
    if "\\ud" not in text.lower():
        return InvalidRequest(message)
    try:
        check_storable(json.loads(text))
    except InvalidRequest as unstorable:
        return unstorable
    except (ValueError, RecursionError):
        return InvalidRequest(message)
    return InvalidRequest(message)


def check_storable(document: object) -> int:
    """Walk `document` without recursion and refuse what cannot be stored, naming its path. Returns how many keys it has."""
    stack: list[tuple[object, tuple[object, ...]]] = [(document, ())]
    seen = keys = 0
    while stack:
        value, path = stack.pop()
        seen += 1
        if seen > VALUES_MAX:
            raise _too_many_values()
        if len(path) > DEPTH_MAX:
            raise InvalidRequest(f"{_dotted(path[:5])}…: nested more than {DEPTH_MAX} levels deep")
        if isinstance(value, str):
            _check_text(value, path)
        elif isinstance(value, dict):
            items = cast(dict[str, object], value)
            keys += len(items)
            for key in items:
                _check_text(key, (*path, key))
            stack.extend((item, (*path, key)) for key, item in items.items())
        elif isinstance(value, list):
            stack.extend((item, (*path, index)) for index, item in enumerate(cast(list[object], value)))
        elif isinstance(value, (int, float)) and not _is_bounded(value):
            raise InvalidRequest(f"{_dotted(path)}: number out of range")
    return keys


def _is_bounded(value: float) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return -INT_MAX <= value <= INT_MAX


def _check_text(text: str, path: tuple[object, ...]) -> None:
    if "\x00" in text:
        raise InvalidRequest(f"{_dotted(path)}: text must not contain NUL characters (U+0000)")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(f"{_dotted(path)}: text must not contain unpaired surrogates") from error


def _dotted(path: tuple[object, ...]) -> str:
    parts = (str(part)[:PATH_PART_CHARS_MAX].replace("\x00", "\\u0000") for part in path)
    return ".".join(parts) or "body"
