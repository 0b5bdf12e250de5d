"""Who may ask and who may change the models: a token for each, and several while one is being replaced."""

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest

from serving.http import app
from serving.model.manager import ModelManager
from serving.settings import Settings
from tests.support import live_server, tiny_onnx

ASKS, CHANGES = "token-of-callers", "token-of-operators"


@pytest.fixture
def champions(tmp_path: Path) -> Path:
    live_server.point(tmp_path / "champions", tiny_onnx.write(tmp_path / "champions/a/bundle").folder)
    return tmp_path / "champions/champion.json"


def answers(champions: Path, tokens: dict[str, Any], *given: str | None) -> list[tuple[int, int]]:
    """The statuses of asking which models are held, and of ending the shadow, with each given token in turn."""
    settings = Settings(champions=champions, **tokens)
    models = ModelManager(settings)
    web, handler, _ = app.build(settings, models)

    async def ask() -> list[tuple[int, int]]:
        statuses = []
        async with httpx.AsyncClient(transport=httpx.ASGITransport(web), base_url="http://here") as http:
            for token in given:
                headers = {"Authorization": f"Bearer {token}"} if token else {}
                asked = await http.get("/v1/models", headers=headers)
                changed = await http.post("/v1/models/shadow", json={"bundle": None}, headers=headers)
                for answer in (asked, changed):
                    assert not any(word in answer.text for word in (ASKS, CHANGES))
                statuses.append((asked.status_code, changed.status_code))
        return statuses

    try:
        return asyncio.run(ask())
    finally:
        handler.close()
        models.close()


def test_a_token_for_callers_and_another_for_changes(champions: Path) -> None:
    roles = {"token": ASKS, "change_token": CHANGES}
    assert answers(champions, roles, ASKS, CHANGES, "wrong", None) == [(200, 403), (200, 200), (401, 401), (401, 401)]


def test_one_token_for_changes_alone_leaves_the_answers_open(champions: Path) -> None:
    assert answers(champions, {"change_token": CHANGES}, CHANGES, "wrong", None) == [(200, 200), (200, 401), (200, 401)]


def test_one_token_for_all_and_none(champions: Path) -> None:
    assert answers(champions, {"token": ASKS}, ASKS, None) == [(200, 200), (401, 401)]
    assert answers(champions, {}, ASKS, None) == [(200, 403), (200, 403)]


def test_several_of_each_while_they_are_replaced(champions: Path) -> None:
    roles = {"token": f"{ASKS}\n{ASKS}-next\n", "change_token": f" {CHANGES}\r\n\n{CHANGES}-next"}
    found = answers(champions, roles, f"{ASKS}-next", CHANGES, f"{CHANGES}-next", f"{ASKS} {ASKS}-next")
    assert found == [(200, 403), (200, 200), (200, 200), (401, 401)]
