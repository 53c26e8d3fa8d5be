"""Bodies and queries of the session endpoints.

Closed models: an unknown field is a 400 that names it, and so is a kind that this server does not serve yet.
"""

import base64
import binascii
import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, StringConstraints, field_validator, model_validator
from pydantic_core import PydanticCustomError

from managed_agents.core import limits
from managed_agents.eventlog.events import PERSISTED_TYPES
from managed_agents.resources.agents.schemas import AgentRef, SessionAgentUpdate, Version
from managed_agents.resources.sessions import served, web_addresses
from managed_agents.web.models import Flag, Instant, QueryModel, RequestModel

IMAGE_BYTES_MAX = 5 * 1024 * 1024
PDF_BYTES_MAX = 20 * 1024 * 1024
URL_CHARS_MAX = 2048
DOCUMENT_TITLE_CHARS_MAX = 500
DENY_MESSAGE_CHARS_MAX = 10_000  # assumed: the hosted limit is undocumented
SYSTEM_BLOCKS_MAX = 1000  # spec: text blocks of a system.message
TOKEN_CHARS_MAX = 4096  # assumed
BRANCH_CHARS_MAX = 255  # assumed
TITLE_CHARS_MAX = 500  # assumed: the hosted limit is undocumented

_MAGIC = {
    "image/png": (b"\x89PNG\r\n\x1a\n",),
    "image/jpeg": (b"\xff\xd8\xff",),
    "image/gif": (b"GIF87a", b"GIF89a"),
    "image/webp": (b"RIFF",),
}


def _not_blank(value: str) -> str:
    # The model API refuses blank text blocks; accepted here, one would make every later request of the session fail.
    if not value.strip():
        raise PydanticCustomError("blank_text", "text content blocks must contain non-whitespace text")
    return value


def _url(value: str) -> str:
    if (wrong := web_addresses.wrong_with(value)) is not None:
        raise PydanticCustomError("url", "{wrong}", {"wrong": wrong})
    return value


NonBlank = Annotated[str, AfterValidator(_not_blank)]
Url = Annotated[str, StringConstraints(max_length=URL_CHARS_MAX), AfterValidator(_url)]


def decoded(data: str, bytes_max: int) -> bytes:
    """Decode base64 strictly. Raises a validation error for anything else, or for more than `bytes_max` bytes."""
    try:
        raw = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise PydanticCustomError("base64", "Input should be valid base64") from error
    if not raw:
        raise PydanticCustomError("base64_empty", "Input should not be empty")
    if len(raw) > bytes_max:
        raise PydanticCustomError("too_big", "exceeds {size} MB maximum", {"size": bytes_max // (1024 * 1024)})
    return raw


class TextBlock(RequestModel):
    type: Literal["text"]
    text: NonBlank


class Base64ImageSource(RequestModel):
    type: Literal["base64"]
    media_type: Literal["image/png", "image/jpeg", "image/gif", "image/webp"]
    data: str

    @field_validator("data", mode="after")
    @classmethod
    def _image(cls, value: str, info: Any) -> str:
        raw = decoded(value, IMAGE_BYTES_MAX)
        media_type = info.data.get("media_type")
        fits = media_type is None or (raw.startswith(_MAGIC[media_type]) and (media_type != "image/webp" or raw[8:12] == b"WEBP"))
        if not fits:
            raise PydanticCustomError("image", "the data is not an image of the given media_type")
        return value


class UrlSource(RequestModel):
    type: Literal["url"]
    url: Url


class ImageBlock(RequestModel):
    type: Literal["image"]
    source: Annotated[Annotated[Base64ImageSource | UrlSource, Field(discriminator="type")], BeforeValidator(served.source)]


class Base64DocumentSource(RequestModel):
    type: Literal["base64"]
    media_type: Literal["application/pdf"]
    data: str

    @field_validator("data", mode="after")
    @classmethod
    def _pdf(cls, value: str) -> str:
        if not decoded(value, PDF_BYTES_MAX).startswith(b"%PDF"):
            raise PydanticCustomError("pdf", "the data is not a PDF")
        return value


class TextDocumentSource(RequestModel):
    type: Literal["text"]
    media_type: Literal["text/plain"]
    data: NonBlank


class DocumentBlock(RequestModel):
    type: Literal["document"]
    source: Annotated[
        Annotated[Base64DocumentSource | TextDocumentSource | UrlSource, Field(discriminator="type")],
        BeforeValidator(served.source),
    ]
    # The model API refuses empty ones, and longer titles.
    title: Annotated[str, StringConstraints(min_length=1, max_length=DOCUMENT_TITLE_CHARS_MAX)] | None = None
    context: Annotated[str, StringConstraints(min_length=1)] | None = None


class ResultTextBlock(RequestModel):
    """Text of a tool: may be blank, a tool does not choose its output. Repaired on the way to the model."""

    type: Literal["text"]
    text: str


class Citations(RequestModel):
    enabled: bool


class SearchResultBlock(RequestModel):
    """spec: beta_managed_agents_search_result_block_param.py"""

    type: Literal["search_result"]
    source: str
    title: str
    content: list[TextBlock] = Field(min_length=1)
    citations: Citations


ContentBlock = Annotated[TextBlock | ImageBlock | DocumentBlock, Field(discriminator="type")]
ResultBlock = Annotated[ResultTextBlock | ImageBlock | DocumentBlock | SearchResultBlock, Field(discriminator="type")]


class UserMessage(RequestModel):
    type: Literal["user.message"]
    content: list[ContentBlock] = Field(min_length=1)


class UserInterrupt(RequestModel):
    type: Literal["user.interrupt"]
    session_thread_id: str | None = None


class UserToolConfirmation(RequestModel):
    """`session_thread_id` is the server's to set: a client that sends it back is not refused, and it has no effect."""

    type: Literal["user.tool_confirmation"]
    tool_use_id: str
    result: Literal["allow", "deny"]
    deny_message: Annotated[str, StringConstraints(max_length=DENY_MESSAGE_CHARS_MAX)] | None = None
    session_thread_id: str | None = None

    @model_validator(mode="after")
    def _message_of_a_denial(self) -> Self:
        # spec: BetaManagedAgentsUserToolConfirmationEventParams, a message belongs to a denial
        if self.deny_message is not None and self.result != "deny":
            raise PydanticCustomError("deny_message", "deny_message is only allowed when result is 'deny'")
        return self


class UserCustomToolResult(RequestModel):
    """spec: beta_managed_agents_user_custom_tool_result_event_params.py"""

    type: Literal["user.custom_tool_result"]
    custom_tool_use_id: str
    content: list[ResultBlock] | None = None
    is_error: bool | None = None
    session_thread_id: str | None = None


class UserToolResult(RequestModel):
    """spec: beta_managed_agents_user_tool_result_event_params.py"""

    type: Literal["user.tool_result"]
    tool_use_id: str
    content: list[ResultBlock] | None = None
    is_error: bool | None = None
    session_thread_id: str | None = None


class SystemMessage(RequestModel):
    """spec: beta_managed_agents_system_message_event_params.py"""

    type: Literal["system.message"]
    content: list[TextBlock] = Field(min_length=1, max_length=SYSTEM_BLOCKS_MAX)


AnyClientEvent = UserMessage | UserInterrupt | UserToolConfirmation | UserCustomToolResult | UserToolResult | SystemMessage
ClientEvent = Annotated[Annotated[AnyClientEvent, Field(discriminator="type")], BeforeValidator(served.event)]
InitialEvent = Annotated[UserMessage, BeforeValidator(served.event)]


class SendEvents(RequestModel):
    """`POST /v1/sessions/{id}/events`."""

    events: list[ClientEvent] = Field(min_length=1, max_length=limits.EVENTS_PER_SEND_MAX)


class FileResource(RequestModel):
    type: Literal["file"]
    file_id: str
    mount_path: str | None = None


# spec: https://github.com/<owner>/<repo>, without .git
_REPOSITORY_URL = re.compile(r"https://github\.com/[A-Za-z0-9][A-Za-z0-9-]{0,38}/(?!\.{1,2}$)(?!.*\.git$)[A-Za-z0-9._-]{1,100}")
# What git refuses in names of branches, and what it would take for an option.
_NO_BRANCH = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|//|^[-/.]|/\.|\.$|/$|\.lock(/|$)|^@$")


def _repository_url(value: str) -> str:
    if _REPOSITORY_URL.fullmatch(value) is None:
        raise PydanticCustomError("repository_url", "Input should be of the form https://github.com/<owner>/<repo>, without .git")
    return value


def _branch(value: str) -> str:
    if _NO_BRANCH.search(value):
        raise PydanticCustomError("branch", "Input should be the name of a branch")
    return value


def _token(value: SecretStr) -> SecretStr:
    if not 0 < len(value) <= TOKEN_CHARS_MAX:
        raise PydanticCustomError("token", "Input should have 1 to {chars} characters", {"chars": TOKEN_CHARS_MAX})
    if not all(33 <= ord(char) < 127 for char in value.get_secret_value()):
        # Part of a header in the end; never shown, so the message does not say which.
        raise PydanticCustomError("token", "Input should have printable ASCII characters only, and no spaces")
    return value


Token = Annotated[SecretStr, AfterValidator(_token)]


class BranchCheckout(RequestModel):
    type: Literal["branch"]
    name: Annotated[str, StringConstraints(min_length=1, max_length=BRANCH_CHARS_MAX), AfterValidator(_branch)]


class CommitCheckout(RequestModel):
    type: Literal["commit"]
    sha: Annotated[str, StringConstraints(pattern=r"^([0-9a-f]{40}|[0-9a-f]{64})$")]  # spec: the full one


Checkout = Annotated[BranchCheckout | CommitCheckout, Field(discriminator="type")]


class GithubRepository(RequestModel):
    """spec: beta_managed_agents_github_repository_resource_params.py"""

    type: Literal["github_repository"]
    url: Annotated[str, AfterValidator(_repository_url)]
    authorization_token: Token | None = None
    mount_path: str | None = None
    checkout: Checkout | None = None


Resource = Annotated[Annotated[FileResource | GithubRepository, Field(discriminator="type")], BeforeValidator(served.resource)]
AddedResource = Annotated[FileResource, BeforeValidator(served.added_resource)]

Title = Annotated[str, StringConstraints(max_length=TITLE_CHARS_MAX)]
EVENT_DELTAS_MAX = 100  # spec: event_stream_params.py; more values are refused
RESOURCES_MAX = 500  # spec: file resources per session


class MonetaryAmount(RequestModel):
    """Whole cents. spec: beta_monetary_amount_param.py"""

    amount: Annotated[str, StringConstraints(pattern=r"^[1-9][0-9]{0,14}$")]
    currency: Literal["USD"]


class Budget(RequestModel):
    """spec: beta_managed_agents_budget_limit_param.py"""

    type: Literal["limit"]
    max_list_cost: MonetaryAmount

    @property
    def cents(self) -> int:
        return int(self.max_list_cost.amount)


class CreateSession(RequestModel):
    """`POST /v1/sessions`."""

    agent: AgentRef
    environment_id: str
    title: Title | None = None
    metadata: dict[str, str] | None = None
    resources: list[Resource] = Field(default_factory=list[Resource], max_length=RESOURCES_MAX)
    vault_ids: Annotated[list[str] | None, BeforeValidator(served.nothing)] = None
    budget: Budget | None = None
    initial_events: list[InitialEvent] = Field(default_factory=list[InitialEvent], max_length=limits.EVENTS_PER_SEND_MAX)


def _not_updatable(_value: Any) -> Any:
    # spec: session_update_params.py, any value of vault_ids is rejected
    raise PydanticCustomError("not_updatable", "updating vault_ids is not yet supported")


class UpdateSession(RequestModel):
    """`POST /v1/sessions/{id}`: fields that were not sent keep their value."""

    title: Title | None = None
    metadata: dict[str, str | None] | None = None
    vault_ids: Annotated[None, BeforeValidator(_not_updatable)] = None
    budget: Budget | None = None
    agent: SessionAgentUpdate = SessionAgentUpdate()


Status = Literal["rescheduling", "running", "idle", "terminated"]
Order = Literal["asc", "desc"]


class ListSessions(QueryModel):
    """`GET /v1/sessions`."""

    limit: Annotated[int, Field(ge=1, le=limits.PAGE_LIMIT_MAX)] = limits.PAGE_LIMIT_DEFAULT
    page: str | None = None
    order: Order = "desc"
    agent_id: str | None = None
    agent_version: Version | None = None
    deployment_id: str | None = None
    memory_store_id: str | None = None
    statuses: list[Status] | None = None
    include_archived: Flag = False
    created_at_gt: Instant | None = Field(None, alias="created_at[gt]")
    created_at_gte: Instant | None = Field(None, alias="created_at[gte]")
    created_at_lt: Instant | None = Field(None, alias="created_at[lt]")
    created_at_lte: Instant | None = Field(None, alias="created_at[lte]")


def _event_type(value: str) -> str:
    if value not in PERSISTED_TYPES:
        raise PydanticCustomError("event_type", "unknown event type")
    return value


class ListEvents(QueryModel):
    """`GET /v1/sessions/{id}/events`."""

    limit: Annotated[int, Field(ge=1, le=limits.EVENTS_PAGE_LIMIT_MAX)] = limits.EVENTS_PAGE_LIMIT_MAX
    page: str | None = None
    order: Order = "asc"
    types: list[Annotated[str, AfterValidator(_event_type)]] | None = None
    created_at_gt: Instant | None = Field(None, alias="created_at[gt]")
    created_at_gte: Instant | None = Field(None, alias="created_at[gte]")
    created_at_lt: Instant | None = Field(None, alias="created_at[lt]")
    created_at_lte: Instant | None = Field(None, alias="created_at[lte]")


class StreamEvents(QueryModel):
    """`GET /v1/sessions/{id}/events/stream`."""

    event_deltas: Annotated[list[Literal["agent.message", "agent.thinking"]] | None, Field(max_length=EVENT_DELTAS_MAX)] = None


class ListThreads(QueryModel):
    """`GET /v1/sessions/{id}/threads`."""

    limit: Annotated[int, Field(ge=1, le=limits.EVENTS_PAGE_LIMIT_MAX)] = limits.EVENTS_PAGE_LIMIT_MAX
    page: str | None = None
    statuses: list[Status] | None = None


class ListThreadEvents(QueryModel):
    """`GET /v1/sessions/{id}/threads/{thread_id}/events`."""

    limit: Annotated[int, Field(ge=1, le=limits.EVENTS_PAGE_LIMIT_MAX)] = limits.EVENTS_PAGE_LIMIT_MAX
    page: str | None = None


class ListResources(QueryModel):
    """`GET /v1/sessions/{id}/resources`: without a limit all of them."""

    limit: Annotated[int, Field(ge=1, le=limits.RESOURCES_PAGE_LIMIT_MAX)] | None = None
    page: str | None = None


class RotateToken(RequestModel):
    """`POST /v1/sessions/{id}/resources/{resource_id}`."""

    authorization_token: Token
