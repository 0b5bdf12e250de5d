"""serving.access.tokens: files of tokens, exchanged while the service runs."""

import os
import stat
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from starlette.requests import Request

from serving.access.tokens import LOOK_EVERY_S, Role, Roles, TokenFile
from serving.http.requests import Problem
from serving.settings import Settings, SettingsError
from serving.telemetry import metrics


class Clock:
    """Seconds that a test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def later(self) -> None:
        self.now += LOOK_EVERY_S


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    events: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(metrics, "event", lambda kind, **facts: events.append((kind, facts)))
    return events


def status(roles: Roles, token: str, role: Role) -> int:
    """The status that a request with this token would hear of a route for `role`."""
    scope = {"type": "http", "headers": [(b"authorization", f"Bearer {token}".encode())]}
    try:
        roles.check(Request(scope), role)
    except Problem as problem:
        return problem.status
    return 200


def test_a_changed_file_counts_and_a_bad_one_changes_nothing(
    tmp_path: Path, told: list[tuple[str, dict[str, Any]]]
) -> None:
    path, clock = tmp_path / "tokens", Clock()
    path.write_text("first\n")
    tokens = TokenFile(path, "MARGINALIA_TOKEN_FILE", clock)
    assert tokens.tokens() == ["first"]

    path.write_text(" first \r\n\nsecond")
    clock.later()
    assert tokens.tokens() == ["first", "second"]
    assert told == [("tokens-changed", {"file": str(path), "tokens": 2})]

    for damage in ("", "n\xf6\n", "x" * (65 << 10)):
        told.clear()
        path.write_text(damage)
        for _ in range(3):
            clock.later()
            assert tokens.tokens() == ["first", "second"]
        assert [kind for kind, _ in told] == ["tokens-refused"]  # once, not at each look
    told.clear()
    path.unlink()
    clock.later()
    assert tokens.tokens() == ["first", "second"]
    assert [kind for kind, _ in told] == ["tokens-refused"]

    path.write_text("third")
    clock.later()
    assert tokens.tokens() == ["third"]
    assert not any(word in str(told) for word in ("first", "second", "third"))


def test_a_link_that_is_moved_to_another_folder_is_a_change(tmp_path: Path) -> None:
    """As Kubernetes exchanges a mounted secret: file -> ..data/file, and ..data is renamed over."""
    clock = Clock()
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "token").write_text(name)
        os.utime(tmp_path / name / "token", ns=(0, 0))  # the same size and the same time
    (tmp_path / "..data").symlink_to("old")
    (tmp_path / "token").symlink_to("..data/token")
    tokens = TokenFile(tmp_path / "token", "MARGINALIA_TOKEN_FILE", clock)
    assert tokens.tokens() == ["old"]
    (tmp_path / "..next").symlink_to("new")
    (tmp_path / "..next").rename(tmp_path / "..data")
    clock.later()
    assert tokens.tokens() == ["new"]


@pytest.mark.parametrize(
    ("content", "said"), [(None, "cannot be read"), ("\n", "is empty"), ("s\xe4crit", "is empty or")]
)
def test_the_service_does_not_start_without_its_tokens(tmp_path: Path, content: str | None, said: str) -> None:
    path = tmp_path / "tokens"
    if content is not None:
        path.write_text(content)
    for name in ("token_file", "change_token_file"):
        with pytest.raises(SettingsError, match=f"MARGINALIA_{name.upper()}: .*tokens {said}") as caught:
            Roles(Settings(**{name: path}))
        assert "crit" not in str(caught.value)


def test_a_folder_in_the_files_place_is_named(tmp_path: Path) -> None:
    assert stat.S_ISDIR(tmp_path.stat().st_mode)
    with pytest.raises(SettingsError, match="cannot be read"):
        Roles(Settings(token_file=tmp_path))


def test_the_variable_and_the_file_are_both_good(tmp_path: Path) -> None:
    (tmp_path / "callers").write_text("caller-file")
    (tmp_path / "operators").write_text("operator-file")
    roles = Roles(
        Settings(
            token=SecretStr("caller-variable"),
            token_file=tmp_path / "callers",
            change_token_file=tmp_path / "operators",
        )
    )
    for token in ("caller-variable", "caller-file"):
        assert (status(roles, token, "caller"), status(roles, token, "operator")) == (200, 403)
    assert (status(roles, "operator-file", "caller"), status(roles, "operator-file", "operator")) == (200, 200)
    assert (status(roles, "nobody", "anyone"), status(roles, "nobody", "caller")) == (200, 401)
