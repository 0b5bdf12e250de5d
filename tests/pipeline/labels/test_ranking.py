"""Ranking: rarity, doubt, diversity, group caps against closed cases."""

import numpy as np
import pytest

from pipeline.labels import ranking
from pipeline.storage import predictions
from tests.support import tiny_project


def made(
    doubt_NK: list[list[float]], place: list[list[float]], groups: str = "", labelled: int = 0
) -> predictions.PredictionPool:
    """A pool with these doubts and embeddings; the first `labelled` rows are labelled, groups one letter a row."""
    n, k = len(doubt_NK), len(doubt_NK[0])
    names = np.array([f"i{j:02d}" for j in range(n)])
    split = np.array(["labelled"] * labelled + ["unlabelled"] * (n - labelled))
    ones = np.ones(n)
    return predictions.PredictionPool(
        names, names, np.array(["base"] * n), np.array(list(groups) or [""] * n), split, np.array(place, float),
        ones, ones, ones, np.full((n, k), 1 / k), np.array(doubt_NK, float), np.array([f"c{j}" for j in range(k)]),
        np.full((n, predictions.MARGIN_BINS), 1 / predictions.MARGIN_BINS),
    )  # fmt: skip


def test_rarity_is_the_capped_root_of_the_ratio() -> None:
    np.testing.assert_allclose(ranking.rarity(np.array([0.64, 0.32, 0.04, 0.0])), [1, np.sqrt(2), 4, 4])
    np.testing.assert_allclose(ranking.rarity(np.array([0.5, 0.125, 0.375])), [1, 2, np.sqrt(4 / 3)])
    np.testing.assert_array_equal(ranking.rarity(np.zeros(3)), 1)  # nothing labelled: nothing is rare


def test_label_frequency_reads_the_summary_by_name() -> None:
    summary = {"classes": tiny_project.CLASSES, "pixels": {"labelled": {"sky": 30, "wall": 60, "lamp": 10}}}
    np.testing.assert_allclose(ranking.label_frequency(summary, tiny_project.NAMES), [0.3, 0.6, 0.0, 0.1])


def test_doubt_in_a_rare_class_counts_more() -> None:
    seen = made([[0.1, 0.0], [0.0, 0.1]], [[0, 0], [0, 0]])
    got = ranking.doubt(seen, np.array([0.8, 0.2]))
    np.testing.assert_allclose(got, [0.1, 0.2])


def test_doubt_decides_between_equals_and_labelled_images_are_never_chosen() -> None:
    seen = made([[0.9], [0.2], [0.4], [0.3], [0.1]], [[0, 0], [1, 0], [-1, 0], [0, 1], [0, -1]], labelled=1)
    choices = ranking.choose(seen, np.array([1.0]), 3)
    assert choices[0].index == 2
    assert 0 not in {c.index for c in choices}
    assert len({c.index for c in choices}) == 3


def test_a_near_copy_of_a_labelled_or_chosen_image_waits() -> None:
    """Two doubtful twins, and a less doubtful image elsewhere: the second twin comes last."""
    seen = made([[0.1], [0.50], [0.49], [0.3]], [[0, 0], [4, 0], [4, 0.01], [0, 4]], labelled=1)
    assert [c.index for c in ranking.choose(seen, np.array([1.0]), 3)] == [1, 3, 2]
    beside = made([[0.1], [0.50], [0.3]], [[4, 0], [4, 0.01], [0, 4]], labelled=1)
    assert ranking.choose(beside, np.array([1.0]), 1)[0].index == 2


def test_no_group_gives_more_than_twice_its_share_unless_all_are_used_up() -> None:
    rng = np.random.default_rng(0)
    doubts = [[0.9 - 0.001 * i] for i in range(20)] + [[0.2 - 0.001 * i] for i in range(20)]
    groups = "a" * 20 + "b" * 8 + "c" * 6 + "d" * 6
    seen = made(doubts, rng.normal(size=(40, 3)).tolist(), groups)
    chosen = [groups[c.index] for c in ranking.choose(seen, np.array([1.0]), 8)]
    assert chosen.count("a") == 4  # 8 wanted, 4 groups: at most 4 each
    only = made(doubts[:20], rng.normal(size=(20, 3)).tolist(), "a" * 19 + "b")
    assert len(ranking.choose(only, np.array([1.0]), 8)) == 8


def test_without_labelled_images_the_most_doubtful_comes_first() -> None:
    seen = made([[0.2], [0.6], [0.4]], [[0, 0], [1, 1], [2, 0]])
    assert ranking.choose(seen, np.array([0.0]), 2)[0].index == 1
    assert ranking.choose(made([[0.5]], [[0, 0]], labelled=1), np.array([1.0]), 3) == []


def test_the_order_of_files_decides_nothing() -> None:
    rng = np.random.default_rng(1)
    seen = made(rng.uniform(0, 1, (30, 3)).tolist(), rng.normal(size=(30, 4)).tolist(), "ab" * 15, labelled=4)
    order = rng.permutation(30)
    shuffled = predictions.PredictionPool(**{k: v if k == "classes" else v[order] for k, v in seen.__dict__.items()})
    frequency = np.array([0.5, 0.3, 0.2])
    first = [str(seen.id[c.index]) for c in ranking.choose(seen, frequency, 6)]
    assert first == [str(shuffled.id[c.index]) for c in ranking.choose(shuffled, frequency, 6)]


def slow_choice(pool: predictions.PredictionPool, frequency: np.ndarray, count: int) -> list[ranking.Choice]:
    """The definition: every distance computed anew from the difference, in the order given."""
    doubts = ranking.doubt(pool, frequency)
    rows = ranking.shortlist(pool, frequency, count)
    spread = pool.embedding.std(0)
    place = pool.embedding / np.where(spread > 0, spread, 1.0)
    groups = {str(pool.group[i]) for i in rows} - {""}
    most = max(1, int(np.ceil(2 * count / len(groups)))) if len(groups) > 1 else count
    near = [int(i) for i in np.flatnonzero(pool.split == "labelled")]
    choices: list[ranking.Choice] = []
    free = list(rows)
    while free and len(choices) < count:
        taken = [str(pool.group[c.index]) for c in choices]
        allowed = [i for i in free if not pool.group[i] or taken.count(str(pool.group[i])) < most] or free
        distance = {
            i: min((float(np.linalg.norm(place[[i]] - place[k], axis=1)[0]) for k in near), default=None) for i in free
        }
        gain = [doubts[i] * (1.0 if distance[i] is None else distance[i]) for i in allowed]
        best = allowed[int(np.argmax(gain))]
        choices.append(ranking.Choice(best, float(doubts[best]), distance[best] or 0.0))
        near.append(best)
        free.remove(best)
    return choices


@pytest.mark.parametrize("seed", range(12))
def test_the_choice_is_that_of_the_slow_definition(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without labelled images and groups, with exact copies among the embeddings, in blocks of any size."""
    rng = np.random.default_rng(seed)
    n, labelled, count = 70, (0, 1, 9, 30)[seed % 4], (1, 5, 16, 60)[seed // 3]
    places = rng.normal(size=(n, 6)) * rng.uniform(0, 50, 6) + 100
    places[rng.integers(n, size=12)] = places[rng.integers(n, size=12)]
    groups = "".join(rng.choice(list("aaab"), n)) if seed % 3 else ""
    pool = made(rng.uniform(0, 1, (n, 3)).round(1).tolist(), places.tolist(), groups, labelled)
    monkeypatch.setattr(ranking, "BLOCK", int(rng.integers(1, 300)))
    frequency = np.array([0.5, 0.3, 0.2])
    assert ranking.choose(pool, frequency, count) == slow_choice(pool, frequency, count)


def test_a_near_copy_far_from_the_origin_keeps_its_small_distance() -> None:
    known = np.array([[1e6, 1e6], [1e6 + 5, 1e6]])
    got = ranking.nearest_distance(np.array([[1e6, 1e6 + 1e-3], [1e6 + 5, 1e6]]), known)
    np.testing.assert_allclose(got, [1e-3, 0], rtol=1e-6, atol=0)
