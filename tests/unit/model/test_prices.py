from decimal import Decimal

import pytest

from managed_agents.model.prices import list_cost, price_table, runtime_cost, web_search_cost

MILLION = 1_000_000


def usage(uncached: int = 0, output: int = 0, read: int = 0, five: int = 0, hour: int = 0) -> dict[str, object]:
    return {
        "input_tokens": uncached,
        "output_tokens": output,
        "cache_read_input_tokens": read,
        "cache_creation_input_tokens": five + hour,
        "cache_creation": {"ephemeral_5m_input_tokens": five, "ephemeral_1h_input_tokens": hour},
    }


@pytest.mark.requirement("SES-034")
@pytest.mark.parametrize(
    ("model", "used", "dollars"),
    [
        ("claude-opus-5", usage(uncached=MILLION), "5"),
        ("claude-opus-5", usage(output=MILLION), "25"),
        ("claude-opus-5", usage(read=MILLION), "0.5"),
        ("claude-opus-5", usage(five=MILLION), "6.25"),
        ("claude-opus-5", usage(hour=MILLION), "10"),
        ("claude-fable-5-1", usage(read=MILLION), "0.25"),
        ("claude-sonnet-5-5", usage(read=MILLION), "0.1"),
        ("claude-haiku-4-5-20251001", usage(uncached=MILLION, output=MILLION), "6"),
        ("claude-haiku-5-5", usage(uncached=100_000), "0.01"),
        ("claude-haiku-5-5", usage(uncached=99_999, read=1), "0.00999991"),
        ("claude-haiku-5-5", usage(uncached=100_000, read=1), "0.05000005"),
        ("claude-haiku-5-5", usage(uncached=1, five=100_000, output=1), "0.062503"),
        ("claude-opus-5", {"input_tokens": 1, "output_tokens": 1}, "0.00003"),
        ("claude-opus-5", {"cache_creation_input_tokens": MILLION, "cache_creation": None}, "6.25"),
    ],
)
def test_tokens_cost_what_the_table_says(model: str, used: dict[str, object], dollars: str) -> None:
    assert list_cost(model, used) == Decimal(dollars)


def test_speed_and_region_change_the_price() -> None:
    all_of_it = usage(uncached=MILLION, output=MILLION, read=MILLION, five=MILLION, hour=MILLION)
    assert list_cost("claude-opus-5", all_of_it) == Decimal("46.75")
    assert list_cost("claude-opus-5", all_of_it, speed="fast") == Decimal("93.5")
    assert list_cost("claude-opus-5-5", all_of_it, speed="fast") == Decimal("74.4")
    assert list_cost("claude-opus-5", {**all_of_it, "speed": "fast", "inference_geo": "us"}) == Decimal("102.85")
    assert list_cost("claude-opus-4-6", all_of_it, speed="fast") == Decimal("46.75")
    assert list_cost("claude-opus-5", all_of_it, inference_geo="us") == Decimal("51.425")
    assert list_cost("claude-opus-5", all_of_it, inference_geo="global") == Decimal("46.75")
    assert list_cost("claude-opus-4-5", all_of_it, inference_geo="us") == Decimal("46.75")


def test_a_model_without_a_row_has_no_cost() -> None:
    assert list_cost("claude-fable-5-2", usage(uncached=1)) is None
    assert list_cost("my-own-model", usage(uncached=1)) is None


@pytest.mark.requirement("SES-034")
def test_searches_and_running_time_cost_apart() -> None:
    assert web_search_cost(3) == Decimal("0.03")
    assert runtime_cost(3_600_000) == Decimal("0.08")
    assert runtime_cost(90_000) == Decimal("0.002")


def test_the_table_is_dated_and_its_cache_rates_follow_the_documented_multipliers() -> None:
    table = price_table()
    assert table.as_of == "2026-11-01"
    for row in table.rows.values():
        for rates in filter(None, (row.rates, row.long_prompt, row.fast)):
            assert rates.cache_write_5m == rates.input * Decimal("1.25")
            assert rates.cache_write_1h == rates.input * 2
