"""What an endpoint is, said once: how its request is read and checked, and what the API's document says of it.

    @router.post("")
    @operation(Answer("BetaManagedAgentsAgent"))
    async def create(actor: Developer, db: Db, command: CreateAgent) -> Response:

A parameter whose class is a `RequestModel` (or that is marked `Annotated[…, BODY]`) is the body, one whose class is a
`QueryModel` the query. An endpoint that names no body takes none, one that names no query takes no parameters. What reads
requests is therefore what `api/openapi.py` describes: the two cannot differ.

Order: identity and other dependencies, then query, then body, then the endpoint. A changing request that carries an
`Idempotency-Key` runs as one transaction with the record of its answer (`web/idempotency.py`).

Answers are named by their type in the SDK, the wire contract (adr/0013). It is a name and not the class: importing the
SDK costs seconds, and only the generator of the document needs it.
"""

import functools
import inspect
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any, Final, get_args, get_origin, get_type_hints

import orjson
from pydantic import BaseModel, TypeAdapter
from starlette.requests import Request
from starlette.responses import Response

from managed_agents.web import body, idempotency, query
from managed_agents.web.models import QueryModel, RequestModel

CHANGING: Final = frozenset({"POST", "PUT", "PATCH", "DELETE"})


class Shape(Enum):
    """The form in which an answer holds its type."""

    OBJECT = "one object"
    PAGE = "data, and next_page unless it is the last page"
    PAGE_BOTH_WAYS = "data, next_page and prev_page"
    PAGE_OF_OBJECTS = "data, has_more and the ids at both ends"
    PAGE_OF_FILES = "data and the cursors of current and older SDKs"
    LIST = "data"
    STREAM = "server-sent events"
    BYTES = "the bytes of a file"


@dataclass(frozen=True, slots=True)
class Answer:
    """The 2xx answer of an endpoint: the SDK's name of its type below `anthropic.types.beta`, and its shape.

    `own` is given instead of a name where the SDK has no such type. `secret` marks an answer that is shown once and never
    kept.
    """

    name: str = ""
    shape: Shape = Shape.OBJECT
    own: type[Any] | None = None
    secret: bool = False


class _BodyMarker:
    """Marks the parameter that is the body where its type is not a class (a union, say)."""


BODY: Final = _BodyMarker()

Endpoint = Callable[..., Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class Operation:
    """What is known of an endpoint. `form` describes a multipart body that a dependency reads."""

    answer: Answer
    query: type[QueryModel]
    body: Any = None
    body_required: bool = True
    form: type[BaseModel] | None = None


def operation(answer: Answer, *, form: type[BaseModel] | None = None) -> Callable[[Endpoint], Endpoint]:
    """Return a decorator that makes a function an endpoint. `form`: see `Operation`."""

    def decorate(function: Endpoint) -> Endpoint:
        hints = get_type_hints(function, include_extras=True)
        hints.pop("return", None)
        body_name = next((name for name, hint in hints.items() if _is_body(hint)), None)
        query_name = next((name for name, hint in hints.items() if _is_a(hint, QueryModel)), None)
        described = Operation(
            answer,
            query=hints[query_name] if query_name is not None else QueryModel,
            body=hints[body_name] if body_name is not None else None,
            form=form,
        )
        adapter: TypeAdapter[Any] | None = TypeAdapter(described.body) if body_name is not None else None
        wants_request = "request" in hints

        @functools.wraps(function)
        async def endpoint(request: Request, **arguments: Any) -> Response:
            asked = query.parse(request, described.query)
            document: Any = None
            if query_name is not None:
                arguments[query_name] = asked
            if adapter is not None and body_name is not None:
                document = await body.read_json(request)
                arguments[body_name] = body.validated(document, adapter)
            elif form is None and request.method in CHANGING:
                await body.none(request)
            if wants_request:
                arguments["request"] = request
            if request.method not in CHANGING:
                return await function(**arguments)
            parts = [orjson.dumps(document, option=orjson.OPT_SORT_KEYS), asked.model_dump_json(exclude_unset=True).encode()]
            parts += [each.fingerprint for each in arguments.values() if isinstance(each, idempotency.Fingerprinted)]
            return await idempotency.once(request, parts, lambda: function(**arguments), secret=answer.secret)

        read_here = {body_name, query_name, "request"}
        parameters = [inspect.Parameter("request", inspect.Parameter.KEYWORD_ONLY, annotation=Request)]
        parameters += [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=hint)
            for name, hint in hints.items()
            if name not in read_here
        ]
        endpoint.__dict__["__signature__"] = inspect.Signature(parameters)
        endpoint.__dict__["operation"] = described
        return endpoint

    return decorate


def described(endpoint: Any) -> Operation | None:
    """Return what `operation` recorded of an endpoint, None for a function that it did not decorate."""
    found = getattr(endpoint, "operation", None)
    return found if isinstance(found, Operation) else None


def _is_a(hint: Any, base: type[BaseModel]) -> bool:
    return isinstance(hint, type) and issubclass(hint, base)


def _is_body(hint: Any) -> bool:
    return _is_a(hint, RequestModel) or (get_origin(hint) is Annotated and BODY in get_args(hint)[1:])
