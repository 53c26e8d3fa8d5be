"""Identity and request headers, checked in the order of the hosted API, before any body is read.

1. unknown route: 404, even without a key (the router has decided that before we are asked)
2. missing or bad key: 401
3. missing beta value: 404, as if the route did not exist; unexpected values where the hosted API minds
   them: 400
4. missing `anthropic-version`: 400
5. `anthropic-workspace-id` of a workspace the key may not act in: 403; a scope the key lacks: 403; an environment key where
   none is taken: 403
6. the rate limit: 429

Every route names its actor through one of the aliases at the end; one without an actor is public on purpose.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Annotated

from fastapi import Depends
from starlette.requests import Request

from managed_agents.core import ids
from managed_agents.core.errors import AuthenticationFailed, InvalidRequest, NotFound, PermissionDenied
from managed_agents.web.actor import Actor, Scope
from managed_agents.web.rate_limits import kind_of
from managed_agents.web.state import edge_services

MANAGED_AGENTS = "managed-agents-2026-04-01"
ENVIRONMENTS_OLD = "environments-2025-11-01"
FILES_OLD = "files-api-2025-04-14"
SKILLS_OLD = "skills-2025-10-02"
# spec: the values an SDK or an older client sends together with these endpoints.
EXPECTED = frozenset({MANAGED_AGENTS, ENVIRONMENTS_OLD, FILES_OLD, SKILLS_OLD, "agent-memory-2026-07-22", "oauth-2025-04-20"})
KEY_CHARS_MAX = 512


class Beta(Enum):
    """How strictly a family of endpoints reads `anthropic-beta` (observed hosted behaviour)."""

    REQUIRED = "the managed-agents value; anything beside it is ignored"
    REQUIRED_ONLY = "the managed-agents value; unexpected ones are refused"
    OPTIONAL = "generally available; unexpected ones are refused"
    IGNORED = "generally available; none matters"


def betas(request: Request) -> frozenset[str]:
    """Return the values of all `anthropic-beta` headers."""
    values = ",".join(request.headers.getlist("anthropic-beta")).split(",")
    return frozenset(value.strip() for value in values if value.strip())


def has_managed_agents_beta(request: Request) -> bool:
    """Say whether the managed-agents value was sent, or this server does not insist on it."""
    return not edge_services(request).require_beta_header or MANAGED_AGENTS in betas(request)


def _check_betas(request: Request, rule: Beta) -> None:
    if rule in (Beta.REQUIRED, Beta.REQUIRED_ONLY) and not has_managed_agents_beta(request):
        raise NotFound  # as if the route did not exist
    if rule in (Beta.REQUIRED, Beta.IGNORED):
        return
    sent = betas(request)
    unexpected = sent - EXPECTED
    if {MANAGED_AGENTS, ENVIRONMENTS_OLD} <= sent:
        unexpected |= {ENVIRONMENTS_OLD}
    if unexpected:
        names = ", ".join(f"`{value[:100]}`" for value in sorted(unexpected)[:5])
        raise InvalidRequest(f"anthropic-beta: Unexpected value(s) {names} for the `anthropic-beta` header")


def _secrets(request: Request) -> list[str]:
    """Return the keys as sent, at most two: the SDK uses a bearer token, older clients and curl samples `x-api-key`."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    sent = [token.strip() if scheme.lower() == "bearer" else "", request.headers.get("x-api-key", "")]
    return [secret for secret in dict.fromkeys(sent) if 0 < len(secret) <= KEY_CHARS_MAX]


async def _identify(request: Request) -> Actor:
    # A proxy may add a token of its own beside the client's key: either header may be the one that is meant. Whether one of them
    # was known is never told.
    for secret in _secrets(request):
        actor = await edge_services(request).keys.lookup(secret)
        if actor is not None:
            request.state.actor = actor  # the edge puts organisation and workspace on the answer
            return actor
    raise AuthenticationFailed


async def _in_asked_workspace(request: Request, actor: Actor) -> Actor:
    """Return who acts in the workspace that the request names: the key's own, or any for an organisation's administrator."""
    asked = request.headers.get("anthropic-workspace-id")
    if asked is None or asked == actor.workspace_id:
        return actor
    elsewhere = None
    if actor.administers_organization and ids.has_prefix(asked, ids.WORKSPACE):
        elsewhere = await edge_services(request).keys.in_workspace(actor, asked)
    if elsewhere is None:
        raise PermissionDenied("anthropic-workspace-id: does not match the workspace of this API key")
    request.state.actor = elsewhere
    return elsewhere


async def _count(request: Request, actor: Actor) -> None:
    limiter = edge_services(request).rate_limits
    kind = kind_of(request.method, request.scope["route"].path)
    if limiter is not None and kind is not None:
        request.state.admission = await limiter.admit(actor, kind)  # the edge puts it on the answer


@dataclass(frozen=True, slots=True)
class Authenticated:
    """A dependency that settles who is asking and whether they may.

    Environment keys are taken only where `environment_keys` says so; the route then limits them to their environment.
    """

    needed: Scope
    rule: Beta
    environment_keys: bool = False

    async def __call__(self, request: Request) -> Actor:
        actor = await _identify(request)
        _check_betas(request, self.rule)
        if not request.headers.get("anthropic-version"):
            raise InvalidRequest("anthropic-version: header is required")
        actor = await _in_asked_workspace(request, actor)
        self._check_rights(actor)
        await _count(request, actor)
        return actor

    def _check_rights(self, actor: Actor) -> None:
        if actor.environment_id is not None and not self.environment_keys:
            raise PermissionDenied("An environment key cannot be used for this request", error_code="api_key_scope_missing")
        if actor.scope < self.needed:
            raise PermissionDenied(
                f"This API key lacks the scope `{self.needed.name.lower()}`", error_code="api_key_scope_missing"
            )


# Agents, sessions and what belongs to them.
Viewer = Annotated[Actor, Depends(Authenticated(Scope.VIEWER, Beta.REQUIRED))]
Developer = Annotated[Actor, Depends(Authenticated(Scope.DEVELOPER, Beta.REQUIRED))]
# Environments.
StrictViewer = Annotated[Actor, Depends(Authenticated(Scope.VIEWER, Beta.REQUIRED_ONLY))]
StrictDeveloper = Annotated[Actor, Depends(Authenticated(Scope.DEVELOPER, Beta.REQUIRED_ONLY))]
# Files.
PlainViewer = Annotated[Actor, Depends(Authenticated(Scope.VIEWER, Beta.OPTIONAL))]
PlainDeveloper = Annotated[Actor, Depends(Authenticated(Scope.DEVELOPER, Beta.OPTIONAL))]
# The organisation: who and how much anybody may see; keys and workspaces are the administrators'.
OrganizationViewer = Annotated[Actor, Depends(Authenticated(Scope.VIEWER, Beta.IGNORED))]
Administrator = Annotated[Actor, Depends(Authenticated(Scope.ADMIN, Beta.IGNORED))]
# Keys of environments.
StrictAdministrator = Annotated[Actor, Depends(Authenticated(Scope.ADMIN, Beta.REQUIRED_ONLY))]
# Sessions, for workers too: `resources/sessions/access.py` limits these to their environment.
WorkerViewer = Annotated[Actor, Depends(Authenticated(Scope.VIEWER, Beta.REQUIRED, environment_keys=True))]
WorkerDeveloper = Annotated[Actor, Depends(Authenticated(Scope.DEVELOPER, Beta.REQUIRED, environment_keys=True))]
