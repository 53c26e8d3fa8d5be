"""One request or tunnel of a sandbox: what it may do, where it leads, and what is written down about it."""

import functools
import logging
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import anyio

from managed_agents.egress import tls
from managed_agents.egress.access_log import Access, AccessLog, Outcome, Protocol, now
from managed_agents.egress.connect import Connector
from managed_agents.egress.exchange import SILENCE_SECONDS_MAX, Refused
from managed_agents.egress.http import Greet, HttpClient
from managed_agents.egress.policy import Binding, EgressPolicy, PolicyUnknown
from managed_agents.egress.request import Target
from managed_agents.egress.substitution import SecretUnknown, Sources, Substitution
from managed_agents.egress.wire import Stream, Wire, both_ways, splice

if TYPE_CHECKING:
    from managed_agents.egress.authority import Authority  # weighs megabytes

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Credentials:
    """What it takes to write credentials into requests."""

    sources: Sources
    authority: Callable[[], "Authority"]
    """Whose certificates the sandboxes trust. Asked when there is something to lend. Raises: AuthorityUnreadable."""
    trusted: Callable[[], ssl.SSLContext]
    """What servers have to show; see `tls.trusted_context`."""


@dataclass(slots=True)
class Shared:
    """What all sandboxes of a gateway share."""

    policies: EgressPolicy
    log: AccessLog
    connector: Connector
    credentials: Credentials | None
    connections_max: int
    connections_in_all_max: int
    connections_at_most: int
    bytes_max: int
    connections: int = 0


@dataclass(slots=True)
class Sandbox:
    """One sandbox generation."""

    shared: Shared
    id: str
    generation: int
    bytes_used: int | None = None
    """By its session, with what was used before this process; unknown until a policy was read."""


@dataclass(slots=True)
class SandboxVisit:
    """As `Visit`."""

    sandbox: Sandbox
    protocol: Protocol
    target: Target
    bytes_sent: int = 0
    bytes_received: int = 0
    session_id: str | None = None
    began: float = field(default_factory=time.monotonic)
    _bound: tuple[Binding, ...] = ()
    _inner: bool = False

    async def judge(self) -> bool:
        """As `Visit.judge`."""
        sandbox, target = self.sandbox, self.target
        try:
            policy = await sandbox.shared.policies.policy(sandbox.id, sandbox.generation)
        except PolicyUnknown as error:
            message = "The egress gateway cannot read what this sandbox may reach. Please retry."
            raise Refused(message, "unreachable", status=503) from error
        if policy is None:
            raise Refused("This sandbox has no session.", "blocked")
        self.session_id = policy.session_id
        # What was written down may know of more: another generation's, or what another gateway saw.
        sandbox.bytes_used = max(sandbox.bytes_used or 0, policy.bytes_before)
        if sandbox.bytes_used >= sandbox.shared.bytes_max:
            raise Refused("The session's network traffic is used up.", "over_limit")
        # In the clear nothing is lent, and nothing is opened.
        bound = () if self.protocol == "http" else policy.bound(target.host, target.port)
        if self.protocol == "https":
            bound = tuple(one for one in bound if one.covers_path(target.path))
        if not policy.allows(target.host) and not any(one.opens for one in bound):
            raise Refused(f"{target.host} is not among the hosts that this environment's networking allows.", "blocked")
        self._bound = bound
        return bool(bound)

    async def substitutions(self) -> Sequence[Substitution]:
        """As `Visit.substitutions`."""
        if not self._bound:
            return ()
        credentials, session_id = self._credentials(), self.session_id
        assert session_id is not None, "judged"
        try:
            return await credentials.sources.substitutions(session_id, self._bound)
        except SecretUnknown as error:
            raise Refused(str(error), "unreachable", status=503) from error

    async def open(self) -> Stream:
        """As `Visit.open`."""
        if self.protocol == "https":
            return await tls.connect(self.sandbox.shared.connector, self._credentials().trusted(), self.target)
        return await self._connected()

    async def tunnel(self, client: Wire, early: bytes, greet: Greet) -> None:
        """As `Visit.tunnel`. It ends when both sides ended, one broke, or nothing moved for long."""
        upstream = await self._connected()
        try:
            await greet()
            if early:
                self.sent(len(early))
                with anyio.fail_after(SILENCE_SECONDS_MAX):
                    await upstream.send(early)
            up, down = functools.partial(splice, client, upstream), functools.partial(splice, upstream, client)
            await both_ways(up, down, self.sent, self.received, half_open=True, silence_seconds=SILENCE_SECONDS_MAX)
        finally:
            upstream.close()

    async def end_tls(self, client: Wire, early: bytes, greet: Greet) -> None:
        """As `Visit.end_tls`. Each request inside has a visit of its own, and an entry in the log."""
        try:
            context = self._credentials().authority().context(self.target.host)
        except tls.AuthorityUnreadable as error:
            logger.error("certificate authority of the egress gateway: %s", error)
            raise Refused("This gateway has no certificate authority.", "unreachable", status=503) from error
        await greet()
        stream = tls.TlsStream(client, context, server_side=True, early=early)
        try:
            try:
                await stream.handshake()
            except tls.TlsFailed as error:
                raise Refused(f"TLS with the sandbox failed: {error}", "bad_request", status=400) from error
            self._inner = True
            visit = functools.partial(SandboxVisit, self.sandbox)
            await HttpClient(stream, visit, inside=self.target).serve()
        finally:
            stream.close()

    def sent(self, size: int) -> None:
        """As `Books.sent`."""
        self.bytes_sent += size
        self._spend(size)

    def received(self, size: int) -> None:
        """As `Books.received`."""
        self.bytes_received += size
        self._spend(size)

    def close(self, outcome: Outcome) -> None:
        """As `Visit.close`."""
        if self.session_id is None or self._inner:
            return  # nobody's; or told by what was inside
        self.sandbox.shared.log.add(
            Access(
                session_id=self.session_id,
                sandbox_id=self.sandbox.id,
                generation=self.sandbox.generation,
                at=now(),
                protocol=self.protocol,
                host=self.target.host,
                port=self.target.port,
                outcome=outcome,
                bytes_sent=self.bytes_sent,
                bytes_received=self.bytes_received,
                seconds=time.monotonic() - self.began,
            )
        )

    def _credentials(self) -> Credentials:
        found = self.sandbox.shared.credentials
        if found is None:
            raise Refused("This gateway has no credentials to lend.", "unreachable", status=503)
        return found

    async def _connected(self) -> Wire:
        return await self.sandbox.shared.connector.connect(self.target.host, self.target.port)

    def _spend(self, size: int) -> None:
        sandbox = self.sandbox
        sandbox.bytes_used = (sandbox.bytes_used or 0) + size
        sandbox.shared.log.count(sandbox.id, size)
        if sandbox.bytes_used > sandbox.shared.bytes_max:
            raise Refused("The session's network traffic is used up.", "over_limit")
