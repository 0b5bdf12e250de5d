"""serving.settings: MARGINALIA_* variables, refused when unknown or wrong, never repeated back."""

import os
from collections.abc import Mapping
from pathlib import Path
from unittest import mock

import pytest

from serving.settings import PREFIX, Settings, SettingsError, ignored
from serving.settings import from_environment as read_settings


def from_environment(variables: Mapping[str, str]) -> Settings:
    """The settings of a process that has these variables only."""
    with mock.patch.dict(os.environ, variables, clear=True):
        return read_settings()


def ignored_of(variables: Mapping[str, str]) -> list[str]:
    with mock.patch.dict(os.environ, variables, clear=True):
        return ignored()


def test_every_setting_has_a_description() -> None:
    lacking = [name for name, field in Settings.model_fields.items() if not (field.description or "").strip()]
    assert lacking == []


def test_every_setting_is_read_from_its_variable() -> None:
    """Written as text, as an operator would."""
    plain = from_environment({})
    other: dict[str, object] = {"provider": "cpu", "precision": "fp32", "shadow": "x", "threads": 3, "max_batch": 4}
    other |= {"drain_s": 20.0, "admin_address": "[::1]:3010", "memory_mb": 7.5}
    other |= {"client_rate": 2.5, "client_at_once": 3, "client_by": "token", "trusted_proxies": "10.0.0.0/8 ::1"}
    other |= {
        name: Path("x")
        for name in ("bundle", "champions", "bundles", "jobs", "statistics", "token_file", "change_token_file")
    }
    other["cors_origins"] = "https://maps.example.org http://localhost:8080"
    for name in Settings.model_fields.keys() - other.keys() - {"token", "change_token"}:
        default = getattr(plain, name)
        other[name] = not default if isinstance(default, bool) else 2 * default
    for name, value in other.items():
        read = getattr(from_environment({PREFIX + name.upper(): str(value)}), name)
        assert (read, type(read)) == (value, type(value)), name


def test_a_wrong_value_is_reported_with_the_reason_and_what_to_do() -> None:
    with pytest.raises(SettingsError) as caught:
        from_environment({"MARGINALIA_QUEUE": "many"})
    assert str(caught.value) == (
        "MARGINALIA_QUEUE: Input should be a valid integer, unable to parse string as an integer; change or unset it"
    )


def test_defaults_and_values() -> None:
    plain = from_environment({"PATH": "/bin", "OTHER_TOKEN": "x"})
    assert plain.bundle is None
    assert plain.champions == Path("champions/champion.json")
    assert plain.max_body == 32 << 20
    given = {"MARGINALIA_BUNDLE": "/b", "MARGINALIA_MAX_BODY_MB": "0.5", "MARGINALIA_TOKEN": "s3cret"}
    found = from_environment(given)
    assert found.bundle == Path("/b")
    assert found.max_body == 1 << 19
    assert found.token is not None
    assert "s3cret" not in repr(found)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("MARGINALIA_TOKENS", "hush", "did you mean MARGINALIA_TOKEN?"),
        ("MARGINALIA_ZZZZZZ", "hush", "known are MARGINALIA_BUNDLE"),
        ("MARGINALIA_PROVIDER", "hush", "MARGINALIA_PROVIDER"),
        ("MARGINALIA_CONCURRENCY", "0", "MARGINALIA_CONCURRENCY"),
        ("MARGINALIA_TIMEOUT_S", "hush", "MARGINALIA_TIMEOUT_S"),
        ("MARGINALIA_TOKEN", "", "MARGINALIA_TOKEN"),
        ("MARGINALIA_TOKEN", " \n", "MARGINALIA_TOKEN: is empty or"),
        ("MARGINALIA_TOKEN", "hush-hüsch", "MARGINALIA_TOKEN: is empty or has other than printable ASCII"),
        ("MARGINALIA_TOKEN", "hush\x01hush", "MARGINALIA_TOKEN: is empty or has other than printable ASCII"),
        ("MARGINALIA_TOKEN", "hush\rhush", "MARGINALIA_TOKEN: is empty or has other than printable ASCII"),
        ("MARGINALIA_TOKEN", "hush\nhush-hüsch", "MARGINALIA_TOKEN: is empty or has other than printable ASCII"),
        ("MARGINALIA_CHANGE_TOKEN", "\n", "MARGINALIA_CHANGE_TOKEN: is empty or"),
        ("MARGINALIA_CORS_ORIGINS", "hush", "MARGINALIA_CORS_ORIGINS: is no list of origins such as"),
        ("MARGINALIA_CORS_ORIGINS", "https://good.example, https://bad.example/hush", "without a path"),
        *(
            ("MARGINALIA_ADMIN_ADDRESS", wrong, "MARGINALIA_ADMIN_ADDRESS: is no address with a port")
            for wrong in ("hush", "3010", "hush:3010", "127.0.0.1:", "127.0.0.1:0", "::1:3010", "127.0.0.1:70000")
        ),
        ("MARGINALIA_MAX_SLOWDOWN", "0.9", "MARGINALIA_MAX_SLOWDOWN"),
        ("MARGINALIA_SHADOW_SHARE", "1.1", "MARGINALIA_SHADOW_SHARE"),
    ],
)
def test_wrong_variables_are_named(name: str, value: str, said: str) -> None:
    with pytest.raises(SettingsError, match=said.replace("?", r"\?")) as caught:
        from_environment({name: value})
    assert "hush" not in str(caught.value)


def test_whitespace_around_the_token_is_no_part_of_it() -> None:
    token = from_environment({"MARGINALIA_TOKEN": " s3c ret\r\n"}).token
    assert token is not None
    assert token.get_secret_value() == "s3c ret"


def test_what_kubernetes_sets_for_a_service_of_this_name_is_no_setting() -> None:
    links = {
        "MARGINALIA_SERVICE_HOST": "10.0.0.7",
        "MARGINALIA_SERVICE_PORT": "3000",
        "MARGINALIA_SERVICE_PORT_HTTP": "3000",
        "MARGINALIA_WEB_SERVICE_HOST": "10.0.0.8",
        "MARGINALIA_PORT": "tcp://10.0.0.7:3000",
        "MARGINALIA_PORT_3000_TCP": "tcp://10.0.0.7:3000",
        "MARGINALIA_PORT_3000_TCP_PROTO": "tcp",
        "MARGINALIA_PORT_3000_TCP_PORT": "3000",
        "MARGINALIA_PORT_3000_TCP_ADDR": "10.0.0.7",
    }
    assert from_environment(links | {"MARGINALIA_QUEUE": "5"}).queue == 5
    assert ignored_of(links | {"MARGINALIA_QUEUE": "5", "PORT": "tcp://x"}) == sorted(links)
    for name, value in (
        ("PORT", "3000"),
        ("SERVICE", "x"),
        ("PORTS", "tcp://x"),
        ("PORT_TCP", "1"),
        ("SERVICE_HOSTS", "x"),
    ):
        with pytest.raises(SettingsError, match=f"MARGINALIA_{name} is no setting"):
            from_environment({f"MARGINALIA_{name}": value})
