import pytest
from pydantic import SecretStr

from managed_agents.core.settings import Settings
from managed_agents.model.endpoint import is_loopback_host, resolve_endpoint


def settings(**given: object) -> Settings:
    return Settings(**({"model_base_url": None, "model_api_key": None} | given))


def test_nothing_set_means_no_endpoint() -> None:
    assert resolve_endpoint(settings(), {}) is None
    ignored = {"ANTHROPIC_BASE_URL": "http://x", "ANTHROPIC_AUTH_TOKEN": "t", "ANTHROPIC_API_KEY": " "}
    assert resolve_endpoint(settings(), ignored) is None


def test_a_key_alone_means_the_real_api_whatever_the_base_url_variable_says() -> None:
    endpoint = resolve_endpoint(settings(), {"ANTHROPIC_API_KEY": "k", "ANTHROPIC_BASE_URL": "http://127.0.0.1:1"})
    assert endpoint is not None
    assert endpoint.is_real_api
    assert not endpoint.is_loopback
    assert endpoint.base_url.startswith("https://")
    assert endpoint.api_key.get_secret_value() == "k"
    again = resolve_endpoint(settings(model_base_url=endpoint.base_url + "/"), {})
    assert again is not None
    assert again.is_real_api


@pytest.mark.parametrize(
    ("own", "environ", "key"),
    [
        ("own", {"ANTHROPIC_API_KEY": "k"}, "own"),
        (None, {"ANTHROPIC_API_KEY": "k"}, "k"),
        (None, {}, "no-key"),
    ],
)
def test_our_setting_wins_and_finds_a_key(own: str | None, environ: dict[str, str], key: str) -> None:
    secret = SecretStr(own) if own else None
    endpoint = resolve_endpoint(settings(model_base_url="http://localhost:9/", model_api_key=secret), environ)
    assert endpoint is not None
    assert (endpoint.base_url, endpoint.is_real_api, endpoint.is_loopback) == (
        "http://localhost:9",
        False,
        True,
    )
    assert endpoint.api_key.get_secret_value() == key
    assert key not in repr(endpoint) or key == "k"


@pytest.mark.parametrize(
    "url",
    [
        "localhost:9",
        "ftp://x",
        "http://user:pw@x",
        "http://",
        "http://x?key=1",
        "http://x:99999",
        "http://x:0",
        "http://x:y",
        "http://[::1",
        "http://\u2603..com",
    ],
)
def test_a_base_url_that_cannot_be_one_is_an_error(url: str) -> None:
    with pytest.raises(ValueError, match="MODEL_BASE_URL"):
        resolve_endpoint(settings(model_base_url=url), {})


@pytest.mark.parametrize("own", [True, False])
def test_white_space_around_a_key_is_no_part_of_it(own: bool) -> None:
    padded = " \tsk-key\r\n"
    given = settings(model_base_url="http://x", model_api_key=SecretStr(padded) if own else None)
    endpoint = resolve_endpoint(given, {} if own else {"ANTHROPIC_API_KEY": padded})
    assert endpoint is not None
    assert endpoint.api_key.get_secret_value() == "sk-key"


def test_a_key_of_white_space_is_none() -> None:
    endpoint = resolve_endpoint(settings(model_base_url="http://x", model_api_key=SecretStr("\n")), {"ANTHROPIC_API_KEY": "k"})
    assert endpoint is not None
    assert endpoint.api_key.get_secret_value() == "k"


@pytest.mark.parametrize("inside", ["\n", "\0", "\x7f", "\u200b", "\udce9"])
@pytest.mark.parametrize("base_url", ["http://x", None])
def test_a_key_that_no_header_can_carry_is_an_error_that_does_not_show_it(inside: str, base_url: str | None) -> None:
    with pytest.raises(ValueError, match="MODEL_API_KEY or ANTHROPIC_API_KEY has") as caught:
        resolve_endpoint(settings(model_base_url=base_url), {"ANTHROPIC_API_KEY": f"sk-one{inside}two"})
    assert "sk-one" not in str(caught.value)
    assert "two" not in str(caught.value)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("10.0.0.1", False),
        ("localhost.example", False),
        ("127.0.0.1.example", False),
    ],
)
def test_loopback_hosts(host: str, loopback: bool) -> None:
    assert is_loopback_host(host) is loopback
