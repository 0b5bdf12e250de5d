"""One test set, many challengers: what is counted, how the interval widens, how often chance promotes."""

import json
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest

from pipeline.champions import alpha_spending, gate, store
from pipeline.storage import atomic
from tests.support import tiny_settings
from tests.support.command_line import marginalia
from tests.support.tiny_gate import counts, scored, write_run

GATE = tiny_settings.gate(bootstrap=200, class_floor=100.0)
FREE = GATE.model_copy(update={"sequential": "none"})
GOOD = (0.80, 0.80, 0.70)


def test_the_first_comparison_is_as_without_and_the_budget_is_never_overspent() -> None:
    """With many images Student's quantiles are the normal ones, and the tails can be read off the widening."""
    first = -NormalDist().inv_cdf((1 - GATE.confidence) / 2)
    wider = [alpha_spending.widening(GATE, k, 10**6) for k in range(1, 500)]
    assert wider[0] == 1
    assert wider == sorted(wider)
    spent = [NormalDist().cdf(-first * w) for w in wider]
    assert spent[0] == pytest.approx(0.025)
    assert 0.049 < sum(spent) < 0.05
    assert (wider[9], wider[19]) == pytest.approx((1.69, 1.88), abs=0.01)
    assert alpha_spending.widening(GATE, 10, 30) > wider[9]  # few images: thicker tails
    assert alpha_spending.widening(FREE, 77, 30) == 1


@pytest.mark.parametrize(("tail", "freedom", "table"), [(0.025, 29, 2.0452), (0.0005, 29, 3.6594), (0.005, 10, 3.1693)])
def test_students_quantiles_are_those_of_the_tables(tail: float, freedom: int, table: float) -> None:
    assert alpha_spending._student(-NormalDist().inv_cdf(tail), freedom) == pytest.approx(table, rel=0.01)


def test_the_interval_of_a_later_comparison_is_wider_about_the_same_delta() -> None:
    pair = scored("b", counts((0.81, 0.80, 0.70), seed=1)), scored("a", counts(GOOD))
    one, tenth = (gate.judge(*pair, GATE, comparison=k) for k in (1, 10))
    assert one == gate.judge(*pair, FREE, comparison=1)
    assert one.delta == tenth.delta
    wider = alpha_spending.widening(GATE, 10, 30)
    for end, now in zip(one.ci, tenth.ci, strict=True):
        assert now - one.delta == pytest.approx(wider * (end - one.delta))
    assert one.per_class == tenth.per_class  # guarded classes keep their own confidence
    assert "challenger 10 on this test set" in tenth.reason
    assert gate.judge(*pair, FREE, comparison=10).ci == one.ci


def test_of_many_test_sets_that_judge_twenty_useless_challengers_few_promote_one() -> None:
    """Differences per image drawn directly; the champion's own luck on a test set is shared by all twenty."""
    rng, images, worlds = np.random.default_rng(0), 100, 2000
    bar = 1.96 * np.array([alpha_spending.widening(GATE, k, images) for k in range(1, 21)])
    found = []
    for _ in range(worlds):
        gain = rng.normal(size=(20, images)) - rng.normal(size=images)
        found.append(gain.mean(1) / (gain.std(1) / np.sqrt(images)))
    false = {name: float((np.array(found) > limit).any(1).mean()) for name, limit in (("spend", bar), ("none", 1.96))}
    assert 0.02 < false["spend"] <= 0.05
    assert false["none"] > 0.15


def useless(rng: np.random.Generator) -> np.ndarray:
    """A model no better and no worse than any other of these: its luck differs from image to image."""
    conf = np.zeros((60, 3, 3), np.int64)
    for c, size in enumerate((500, 300, 60)):
        right = np.round(size * np.clip(rng.normal(GOOD[c], 0.06, 60), 0, 1)).astype(np.int64)
        conf[:, c, c], conf[:, c, (c + 1) % 3] = right, size - right
    return conf


def test_twenty_useless_challengers_are_promoted_less_often_than_alpha() -> None:
    """The gate itself, on counts. Without spending, more than one world in ten would promote one of them."""
    rng, worlds, names = np.random.default_rng(6), 40, tuple(map(str, range(60)))
    spend, free = 0, 0
    for _ in range(worlds):
        champion = scored("a", useless(rng), images=names)
        verdicts = [
            gate.judge(scored("b", useless(rng), images=names), champion, GATE, comparison=k) for k in range(1, 21)
        ]
        spend += any(verdict.verdict == "promoted" for verdict in verdicts)
        lows = [v.delta + (v.ci[0] - v.delta) / alpha_spending.widening(GATE, k, 60) for k, v in enumerate(verdicts, 1)]
        free += max(lows) > 0
    assert spend / worlds <= 1 - GATE.confidence
    assert free / worlds > 0.1


def test_the_gate_counts_pairs_on_a_test_hash_and_says_so(tmp_path: Path) -> None:
    def told(name: str, recall: tuple[float, float, float], test_hash: str = "t1") -> tuple[str, int | None]:
        write_run(tmp_path, name, counts(recall), test_hash=test_hash)
        gate.run(tmp_path, GATE)
        said = atomic.read_json(tmp_path / "reports/gate.json")
        return said["verdict"], said["comparison"]

    assert told("one", GOOD) == ("promoted", None)  # nothing to compare with
    assert told("two", GOOD) == ("kept", 1)
    assert told("two", GOOD) == ("kept", 1)  # `dvc repro` again: no new look
    assert told("three", GOOD) == ("kept", 2)
    assert told("bad", GOOD, test_hash="t2")[1] is None  # refused: not compared
    assert told("four", (0.95, 0.95, 0.95)) == ("promoted", 3)
    assert told("five", GOOD) == ("kept", 4)
    champion = atomic.read_json(tmp_path / "champions/champion.json")
    assert champion["comparison"] == 3
    assert "challenger 3 on this test set" in champion["reason"]
    lines = [json.loads(line) for line in (tmp_path / "champions/comparisons.jsonl").read_text().splitlines()]
    assert [(line["verdict"], line["test_hash"]) for line in lines] == [("kept", "t1")] * 2 + [
        ("promoted", "t1"),
        ("kept", "t1"),
    ]


def test_an_experiment_is_told_its_number_and_counts_nothing(tmp_path: Path) -> None:
    write_run(tmp_path, "one", counts(GOOD))
    gate.run(tmp_path, GATE)
    write_run(tmp_path, "two", counts(GOOD))
    for _ in range(2):
        assert gate.run(tmp_path, GATE, experiment="odd").comparison == 1
    assert not (tmp_path / "champions/comparisons.jsonl").exists()


def test_a_worn_test_set_is_named_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_settings.write(Path("params.yaml"), gate={"bootstrap": 20})
    first = write_run(tmp_path, "one", counts(GOOD))
    assert marginalia("stage", "gate") == 0
    before = [{"test_hash": "t1", "challenger": f"c{i}", "champion": first} for i in range(alpha_spending.WORN - 2)]
    before += [{"test_hash": "t0", "challenger": f"c{i}", "champion": first} for i in range(9)]  # another test set
    Path("champions/comparisons.jsonl").write_text("".join(json.dumps(line) + "\n" for line in before))
    write_run(tmp_path, "two", counts(GOOD))
    assert marginalia("stage", "gate") == 0
    assert atomic.read_json(Path("reports/gate.json"))["warning"] is None
    write_run(tmp_path, "three", counts(GOOD))
    assert marginalia("stage", "gate") == 0
    warning = atomic.read_json(Path("reports/gate.json"))["warning"]
    assert "label a fresh test set" in warning
    assert "2.0 times" in warning
    assert "label a fresh test set" in capsys.readouterr().err
    assert "chance alone" in alpha_spending.worn(FREE, 20, 30, "t1")


@pytest.mark.parametrize("line", ["{", "[1]", '{"test_hash": "t1"}'])
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / alpha_spending.FILE).write_text(line + "\n")
    with pytest.raises(store.ChampionError, match=r"comparisons\.jsonl: line 1"):
        alpha_spending.read_comparisons(tmp_path)
