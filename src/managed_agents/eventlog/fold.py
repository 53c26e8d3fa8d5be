"""Status, usage and stats as folds of the log. Pure.

`apply()` is the only place where a session's or thread's status changes. Folding a log again from its beginning gives the
stored row; a test does that.
"""

from dataclasses import dataclass, field
from datetime import datetime
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

from managed_agents.eventlog.events import Json, SpanUsage

RUNTIME_DOLLARS_PER_HOUR = Decimal("0.08")  # spec: pricing, session runtime


@dataclass(slots=True)
class Totals:
    """Sums over the model requests of a session or thread."""

    input_tokens: int = 0
    output_tokens: int = 0
    cache_read_input_tokens: int = 0
    cache_5m_input_tokens: int = 0
    cache_1h_input_tokens: int = 0
    web_searches: int = 0
    token_cost: Decimal | None = Decimal(0)  # searches included

    def add(self, usage: SpanUsage) -> None:
        """Add one request. A cost once unknown stays unknown."""
        self.input_tokens += usage.input_tokens
        self.output_tokens += usage.output_tokens
        self.cache_read_input_tokens += usage.cache_read_input_tokens
        self.cache_5m_input_tokens += usage.cache_5m_input_tokens
        self.cache_1h_input_tokens += usage.cache_1h_input_tokens
        self.web_searches += usage.web_searches
        if self.token_cost is not None:
            self.token_cost = None if usage.cost is None else self.token_cost + usage.cost


@dataclass(slots=True)
class Active:
    """Running time: a sum of finished periods plus the start of the open one."""

    seconds: float = 0.0
    since: datetime | None = None

    def start(self, at: datetime) -> None:
        self.since = self.since or at

    def stop(self, at: datetime) -> None:
        self.seconds = self.until(at)
        self.since = None

    def until(self, at: datetime) -> float:
        """Seconds in all at instant `at`."""
        return self.seconds + ((at - self.since).total_seconds() if self.since else 0.0)


@dataclass(slots=True)
class ThreadState:
    """The folded part of a thread row."""

    status: str = "idle"
    active: Active = field(default_factory=Active)
    totals: Totals = field(default_factory=Totals)
    started_at: datetime | None = None
    idled: bool = False


@dataclass(slots=True)
class SessionState:
    """The folded part of a session row."""

    status: str = "idle"
    active: Active = field(default_factory=Active)
    totals: Totals = field(default_factory=Totals)
    requests: int = 0
    threads_running: int = 0
    threads_active_seconds: float = 0.0
    threads_since: datetime | None = None
    terminated_at: datetime | None = None
    # Calls without an answer, in the order of the log: event id of the tool use → type of the event that answers it.
    waiting: dict[str, str] = field(default_factory=dict[str, str])

    def threads_active_until(self, at: datetime) -> float:
        """The sum over threads of their running time, at instant `at`."""
        if self.threads_since is None:
            return self.threads_active_seconds
        return self.threads_active_seconds + self.threads_running * (at - self.threads_since).total_seconds()


_SESSION_STATUS = {
    "session.status_running": "running",
    "session.status_idle": "idle",
    "session.status_rescheduled": "rescheduling",
    "session.status_terminated": "terminated",
}
_THREAD_STATUS = {
    "session.thread_status_running": "running",
    "session.thread_status_idle": "idle",
    "session.thread_status_rescheduled": "rescheduling",
    "session.thread_status_terminated": "terminated",
}
_ANSWERS = frozenset({"agent.tool_result", "user.custom_tool_result", "user.tool_confirmation"})
THREAD_TYPES = frozenset(_THREAD_STATUS) | {"span.model_request_end"}
"""Types that change a thread row; so does any event with a usage."""


def apply(
    session: SessionState,
    thread: ThreadState | None,
    event_type: str,
    at: datetime,
    usage: SpanUsage | None,
) -> None:
    """Fold one event, processed `at`, into the states. `thread` is needed for types in `THREAD_TYPES`."""
    if (status := _SESSION_STATUS.get(event_type)) is not None:
        assert session.status != "terminated", "terminated stays terminated"
        session.status = status
        if status == "running":
            session.active.start(at)
        else:
            session.active.stop(at)
        if status == "terminated":
            session.terminated_at = at
    elif (status := _THREAD_STATUS.get(event_type)) is not None:
        assert thread is not None
        _thread_status(session, thread, status, at)
    if event_type == "span.model_request_end":
        session.requests += 1
    if usage is not None:
        # Of a model request, or of a tool that costs something itself.
        assert thread is not None
        session.totals.add(usage)
        thread.totals.add(usage)


def apply_call(session: SessionState, event_type: str, event_id: str, tool_use_id: str | None, awaits: str | None) -> None:
    """Fold what an event does to the calls that wait for their client: one more (`awaits`), or one less."""
    if awaits is not None:
        session.waiting[event_id] = awaits
    elif tool_use_id is not None and event_type in _ANSWERS:
        session.waiting.pop(tool_use_id, None)


def _thread_status(session: SessionState, thread: ThreadState, status: str, at: datetime) -> None:
    session.threads_active_seconds = session.threads_active_until(at)
    session.threads_running += (status == "running") - (thread.status == "running")
    session.threads_since = at if session.threads_running else None
    thread.status = status
    if status == "running":
        thread.active.start(at)
        thread.started_at = thread.started_at or at
    else:
        thread.active.stop(at)
    if status == "idle":
        thread.idled = True


def money(dollars: Decimal) -> dict[str, str]:
    """An amount as the API shows it: whole cents, nearest."""
    cents = (dollars * 100).quantize(Decimal(1), ROUND_HALF_UP)
    return {"amount": str(int(cents)), "currency": "USD"}


def spent(totals: Totals, active_seconds: float) -> Decimal | None:
    """Exact list cost of a session in US dollars, running time included; None when a model without a list price was used."""
    if totals.token_cost is None:
        return None
    return totals.token_cost + RUNTIME_DOLLARS_PER_HOUR * Decimal(str(active_seconds)) / 3600


def at_cap(budget_cents: int | None, totals: Totals, active_seconds: float) -> bool:
    """Whether the budget lets no further model request begin. A cost that nobody knows is over any budget."""
    if budget_cents is None:
        return False
    dollars = spent(totals, active_seconds)
    return dollars is None or dollars * 100 >= budget_cents


def budget_json(budget_cents: int | None) -> Json | None:
    """The `budget` object of a session. spec: beta_managed_agents_budget_limit.py"""
    if budget_cents is None:
        return None
    return {"type": "limit", "max_list_cost": {"amount": str(budget_cents), "currency": "USD"}}


def usage_json(totals: Totals, active_seconds: float, *, measured: bool, runtime: bool) -> dict[str, Any]:
    """The `usage` object of a session or thread.

    `measured` is false until the first model request ended: `cache_creation` is null then (observed). `runtime` adds the
    price of running time, which only the session's figure includes.
    """
    usage: dict[str, Any] = {
        "input_tokens": totals.input_tokens,
        "output_tokens": totals.output_tokens,
        "cache_read_input_tokens": totals.cache_read_input_tokens,
        "cache_creation": {
            "ephemeral_5m_input_tokens": totals.cache_5m_input_tokens,
            "ephemeral_1h_input_tokens": totals.cache_1h_input_tokens,
        }
        if measured
        else None,
        "active_seconds": round(active_seconds, 6),
        "server_tool_use": {"web_search_requests": totals.web_searches, "web_fetch_requests": 0},
    }
    if (dollars := spent(totals, active_seconds if runtime else 0.0)) is not None:
        usage["list_cost"] = money(dollars)
    return usage
