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
