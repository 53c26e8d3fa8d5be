"""The fold: what a session's row says is what its log says."""

from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest

from managed_agents.eventlog import fold
from managed_agents.eventlog.events import SpanUsage
from managed_agents.eventlog.fold import SessionState, ThreadState

START = datetime(2026, 11, 1, tzinfo=UTC)


def at(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def folded(*events: tuple[str, float, SpanUsage | None]) -> tuple[SessionState, ThreadState]:
    session, thread = SessionState(), ThreadState()
    for event_type, seconds, usage in events:
        fold.apply(session, thread, event_type, at(seconds), usage)
    return session, thread


@pytest.mark.requirement("SES-035")
def test_running_time_is_a_sum_of_periods_plus_the_open_one() -> None:
    session, thread = folded(
        ("session.status_running", 0, None),
        ("session.thread_status_running", 0, None),
        ("session.thread_status_idle", 3, None),
        ("session.status_idle", 3, None),
        ("session.status_running", 10, None),
        ("session.thread_status_running", 10, None),
    )
    assert session.status == thread.status == "running"
    assert session.active.until(at(12)) == 5
    assert session.threads_active_until(at(12)) == 5
    assert thread.active.until(at(12)) == 5
    assert thread.idled
    assert thread.started_at == at(0)


@pytest.mark.requirement("SES-035")
def test_two_threads_at_once_count_once_for_the_session_and_twice_for_its_threads() -> None:
    session, first, second = SessionState(), ThreadState(), ThreadState()
    fold.apply(session, None, "session.status_running", at(0), None)
    fold.apply(session, first, "session.thread_status_running", at(0), None)
    fold.apply(session, second, "session.thread_status_running", at(2), None)
    fold.apply(session, first, "session.thread_status_idle", at(4), None)
    assert session.active.until(at(5)) == 5
    assert session.threads_active_until(at(5)) == 4 + 3


@pytest.mark.requirement("SES-033")
def test_usage_adds_up_and_an_unknown_price_stays_unknown() -> None:
    priced = SpanUsage(10, 5, 3, 2, 1, 1, Decimal("0.0001"))
    session, thread = folded(("span.model_request_end", 1, priced), ("span.model_request_end", 2, priced))
    assert session.totals == thread.totals
    assert (session.totals.input_tokens, session.totals.web_searches) == (20, 2)
    assert session.totals.token_cost == Decimal("0.0002")
    fold.apply(session, thread, "span.model_request_end", at(3), SpanUsage(cost=None))
    fold.apply(session, thread, "span.model_request_end", at(4), priced)
    assert session.totals.token_cost is None
    assert "list_cost" not in fold.usage_json(session.totals, 0, measured=True, runtime=True)


@pytest.mark.requirement("SES-034")
def test_running_time_is_part_of_the_sessions_cost_only() -> None:
    session, _ = folded(("span.model_request_end", 1, SpanUsage(cost=Decimal("0.10"))))
    hour = fold.usage_json(session.totals, 3600, measured=True, runtime=True)
    assert hour["list_cost"] == {"amount": "18", "currency": "USD"}
    thread = fold.usage_json(session.totals, 3600, measured=True, runtime=False)
    assert thread["list_cost"] == {"amount": "10", "currency": "USD"}


@pytest.mark.requirement("SES-040")
def test_terminated_stays_terminated() -> None:
    session, thread = folded(("session.status_terminated", 1, None))
    with pytest.raises(AssertionError):
        fold.apply(session, thread, "session.status_running", at(2), None)


def test_span_usage_survives_its_private_form() -> None:
    usage = SpanUsage(1, 2, 3, 4, 5, 6, Decimal("0.00000123"))
    assert SpanUsage.from_json(usage.as_json()) == usage
    assert SpanUsage.from_json(SpanUsage(cost=None).as_json()).cost is None
