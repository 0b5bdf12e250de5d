"""serving.settings: MARGINALIA_* variables, refused when unknown or wrong, never repeated back."""

from pathlib import Path

import pytest

from serving.settings import SettingsError, from_environment


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
    ],
)
def test_wrong_variables_are_named(name: str, value: str, said: str) -> None:
    with pytest.raises(SettingsError, match=said.replace("?", r"\?")) as caught:
        from_environment({name: value})
    assert "hush" not in str(caught.value)
