"""List prices: pure functions over the dated table `prices.json`. Exact decimals, in US dollars.

A model without a row has no list cost, which callers must be able to tell from a cost of zero.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from importlib.resources import files
from typing import cast

import orjson

from managed_agents.model.names import alias

_MILLION = Decimal(1_000_000)
_RATES = ("input", "output", "cache_write_5m", "cache_write_1h", "cache_read")


@dataclass(frozen=True, slots=True)
class Rates:
    """US dollars per million tokens."""

    input: Decimal
    output: Decimal
    cache_write_5m: Decimal
    cache_write_1h: Decimal
    cache_read: Decimal

    def scaled(self, factor: Decimal) -> "Rates":
        """Return all rates times `factor`."""
        return Rates(*(getattr(self, name) * factor for name in _RATES))


@dataclass(frozen=True, slots=True)
class _Row:
    rates: Rates
    fast: Rates | None
    us_geo: bool
    long_prompt_tokens: int | None
    long_prompt: Rates | None


@dataclass(frozen=True, slots=True)
class PriceTable:
    """The table as loaded."""

    as_of: str
    us_geo_factor: Decimal
    web_search_per_thousand: Decimal
    session_hour: Decimal
    rows: Mapping[str, _Row]


@cache
def price_table() -> PriceTable:
    """Return the table that ships with this version."""
    document = cast("dict[str, object]", orjson.loads(files(__package__ or "").joinpath("prices.json").read_bytes()))
    rows = cast("dict[str, dict[str, object]]", document["models"])
    return PriceTable(
        as_of=cast("str", document["as_of"]),
        us_geo_factor=_decimal(document["us_geo_factor"]),
        web_search_per_thousand=_decimal(document["web_search_per_thousand"]),
        session_hour=_decimal(document["session_hour"]),
        rows={name: _row(row) for name, row in rows.items()},
    )


def _decimal(value: object) -> Decimal:
    assert isinstance(value, str), "prices are strings, so that no float comes near them"
    return Decimal(value)


def _row(row: dict[str, object]) -> _Row:
    rates = Rates(*(_decimal(row[name]) for name in _RATES))
    fast: Rates | None = None
    if (quick := cast("dict[str, object] | None", row.get("fast"))) is not None:
        # assumed: cache rates of fast mode scale with its input rate
        scaled = rates.scaled(_decimal(quick["input"]) / rates.input)
        cached = (scaled.cache_write_5m, scaled.cache_write_1h, scaled.cache_read)
        fast = Rates(_decimal(quick["input"]), _decimal(quick["output"]), *cached)
    long_prompt = cast("dict[str, object] | None", row.get("long_prompt"))
    return _Row(
        rates=rates,
        fast=fast,
        us_geo=cast("bool", row["us_geo"]),
        long_prompt_tokens=cast("int", long_prompt["above_tokens"]) if long_prompt is not None else None,
        long_prompt=Rates(*(_decimal(long_prompt[name]) for name in _RATES)) if long_prompt is not None else None,
    )


def list_cost(
    model: str, usage: Mapping[str, object], *, speed: str | None = None, inference_geo: str | None = None
) -> Decimal | None:
    """Return the list price of one response's tokens; None for a model without a row.

    `usage` is the Messages API's; its own `speed` and `inference_geo`, what was really served, count where the
    arguments are absent. Cache writes without a split by lifetime count as five-minute ones.
    """
    table = price_table()
    row = table.rows.get(alias(model))
    if row is None:
        return None
    uncached, output, read = (_count(usage, n) for n in ("input_tokens", "output_tokens", "cache_read_input_tokens"))
    written = _count(usage, "cache_creation_input_tokens")
    split = usage.get("cache_creation")
    hour = _count(cast("Mapping[str, object]", split), "ephemeral_1h_input_tokens") if isinstance(split, Mapping) else 0
    speed = speed if speed is not None else cast("str | None", usage.get("speed"))
    inference_geo = inference_geo if inference_geo is not None else cast("str | None", usage.get("inference_geo"))
    rates = row.rates
    if row.long_prompt is not None and uncached + read + written > (row.long_prompt_tokens or 0):
        rates = row.long_prompt
    if speed == "fast" and row.fast is not None:
        rates = row.fast
    cost = (
        uncached * rates.input
        + output * rates.output
        + read * rates.cache_read
        + hour * rates.cache_write_1h
        + (written - hour) * rates.cache_write_5m
    )
    if inference_geo == "us" and row.us_geo:
        cost *= table.us_geo_factor
    return cost / _MILLION


def response_cost(
    model: str, usage: Mapping[str, object], *, speed: str | None = None, inference_geo: str | None = None
) -> Decimal | None:
    """Return the list price of one response: its tokens, and the searches that the provider ran for it."""
    tokens = list_cost(model, usage, speed=speed, inference_geo=inference_geo)
    server_tools = usage.get("server_tool_use")
    searches = (
        _count(cast("Mapping[str, object]", server_tools), "web_search_requests") if isinstance(server_tools, Mapping) else 0
    )
    return None if tokens is None else tokens + web_search_cost(searches)


def priced(model: str) -> bool:
    """Whether the model has a list price."""
    return alias(model) in price_table().rows


def web_search_cost(requests: int) -> Decimal:
    """Return the list price of web searches."""
    return requests * price_table().web_search_per_thousand / 1000


def runtime_cost(running_milliseconds: int) -> Decimal:
    """Return the list price of a session's running time, metered by the millisecond."""
    return running_milliseconds * price_table().session_hour / 3_600_000


def _count(usage: Mapping[str, object], name: str) -> int:
    value = usage.get(name)
    return value if isinstance(value, int) else 0
