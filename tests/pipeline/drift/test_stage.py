"""Drift: the statistic against a triple loop, the error rate of the test, the three rules, the stages."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import config
from pipeline.drift import energy_distance, plots, two_sample
from pipeline.storage import atomic, predictions
from tests.support import tiny_project, tiny_settings
from tests.support.command_line import marginalia

SETTINGS = tiny_settings.pool(permutations=199, drift_p=0.01)


def cloud(parts: list[tuple[str, str, str, np.ndarray]]) -> two_sample.Cloud:
    """(split, dump, group, points) -> Cloud."""
    columns = [np.array([part[i] for part in parts for _ in part[3]]) for i in range(3)]
    split, dump, group = columns
    return two_sample.Cloud(np.concatenate([part[3] for part in parts]), dump, group, split)


def singles(split: str, dump: str, points: np.ndarray) -> list[tuple[str, str, str, np.ndarray]]:
    """Each image its own group, as images without a group are stored."""
    return [(split, dump, f"{dump}{i}", points[i : i + 1]) for i in range(len(points))]


def loop_energy(x: np.ndarray, y: np.ndarray) -> float:
    def mean(a: np.ndarray, b: np.ndarray) -> float:
        return sum(float(np.sqrt(((p - q) ** 2).sum())) for p in a for q in b) / (len(a) * len(b))

    def inside(a: np.ndarray) -> float:
        return mean(a, a) * len(a) / (len(a) - 1)

    return 2 * mean(x, y) - inside(x) - inside(y)


def test_energy_is_the_double_loop() -> None:
    rng = np.random.default_rng(0)
    points = rng.normal(size=(12, 3))
    members = np.array([[i in chosen for i in range(12)] for chosen in ({0, 1, 2}, {5, 11}, set(range(6)))])
    got = energy_distance.energies(energy_distance.distances(points), members)
    want = [loop_energy(points[m], points[~m]) for m in members]
    np.testing.assert_allclose(got, want, rtol=1e-9)


def test_energy_is_unbiased_whatever_the_sizes() -> None:
    """Equal distributions: 0 on average, for a pair of images as for twenty (a mean over all pairs would not be)."""
    rng = np.random.default_rng(0)
    for n in (2, 5, 20):
        points = rng.normal(size=(400, 30, 3))
        got = [energy_distance.energies(energy_distance.distances(p), (np.arange(30) < n)[None])[0] for p in points]
        assert abs(np.mean(got)) < 4 * np.std(got) / 20


def test_false_alarms_are_as_rare_as_promised() -> None:
    rng = np.random.default_rng(0)
    settings = tiny_settings.pool(permutations=99, drift_p=0.05)
    flagged = 0
    for _ in range(200):
        points = rng.normal(size=(40, 4))
        parts = singles("labelled", "base", points[:25]) + singles("unlabelled", "new", points[25:])
        finding = two_sample.compare(cloud(parts), "new", settings)
        assert finding.rule == "groups"  # every image is its own group
        flagged += finding.drifted
    assert flagged <= 20  # 5 % of 200 is 10; more than 20 has probability 0.001


def test_a_shift_is_found_and_the_verdict_is_seeded() -> None:
    rng = np.random.default_rng(0)
    parts = singles("labelled", "base", rng.normal(size=(60, 4)))
    parts += singles("unlabelled", "new", rng.normal(size=(30, 4)) + 1.0)
    finding = two_sample.compare(cloud(parts), "new", SETTINGS)
    assert finding.drifted
    assert finding.p == pytest.approx(1 / 200)
    assert finding == two_sample.compare(cloud(parts), "new", SETTINGS)
    assert (finding.images, finding.reference) == (30, 60)


def test_groups_are_permuted_whole_where_there_are_enough() -> None:
    """Twelve videos, each with its own offset: a new trio of videos is nothing special, though frames differ wildly."""
    rng = np.random.default_rng(2)
    sites = [rng.normal(size=4) * 3 + 0.1 * rng.normal(size=(15, 4)) for _ in range(15)]
    parts = [("unlabelled", "base", f"v{i}", s) for i, s in enumerate(sites[:12])]
    usual = cloud(parts + [("unlabelled", "new", f"w{i}", s) for i, s in enumerate(sites[12:])])
    finding = two_sample.compare(usual, "new", SETTINGS)
    assert finding.rule == "groups"
    assert not finding.drifted
    far = cloud(parts + [("unlabelled", "new", f"w{i}", s + 20) for i, s in enumerate(sites[12:])])
    assert two_sample.compare(far, "new", SETTINGS).drifted


def test_with_few_groups_a_dump_must_also_beat_the_spread_between_groups() -> None:
    rng = np.random.default_rng(3)
    sites = [rng.normal(size=4) * 3 + 0.1 * rng.normal(size=(15, 4)) for _ in range(5)]
    parts = [("unlabelled", "base", f"v{i}", s) for i, s in enumerate(sites[:4])]
    finding = two_sample.compare(cloud([*parts, ("unlabelled", "new", "w", sites[4])]), "new", SETTINGS)
    assert finding.rule == "images above group spread"
    assert finding.p < 0.01  # frame by frame it looks new: each site does
    assert not finding.drifted
    assert finding.spread is not None
    assert finding.energy <= finding.spread
    assert two_sample.compare(cloud([*parts, ("unlabelled", "new", "w", sites[4] + 30)]), "new", SETTINGS).drifted


@pytest.mark.parametrize("groups", [3, 5, 12])
def test_one_more_group_like_the_others_is_rarely_flagged(groups: int) -> None:
    """Sites with an offset of their own and wild frames: the chance is that of the bound, however few there are."""
    rng = np.random.default_rng(groups)
    settings, flagged = tiny_settings.pool(permutations=60, drift_p=0.05), 0
    for _ in range(200):
        sites = rng.normal(size=(groups + 1, 1, 4)) + 0.5 * rng.normal(size=(groups + 1, 8, 4))
        parts = [("unlabelled", "base", f"v{i}", s) for i, s in enumerate(sites[:-1])]
        finding = two_sample.compare(cloud([*parts, ("unlabelled", "new", "w", sites[-1])]), "new", settings)
        assert finding.rule == "images above group spread"
        flagged += finding.drifted
    assert (
        flagged <= 20
    )  # 5 % of 200 is 10; the largest of the groups' own distances would be passed by 200 / (groups + 1)


def test_two_groups_say_only_how_far_they_are_apart() -> None:
    rng = np.random.default_rng(3)
    sites = [rng.normal(size=4) * 3 + 0.1 * rng.normal(size=(15, 4)) for _ in range(2)]
    parts = [("unlabelled", "base", f"v{i}", s) for i, s in enumerate(sites)]
    finding = two_sample.compare(cloud([*parts, ("unlabelled", "new", "w", sites[0] + 60)]), "new", SETTINGS)
    assert (finding.rule, finding.drifted) == ("images above two groups", True)
    finding = two_sample.compare(cloud([*parts, ("unlabelled", "new", "w", sites[0] + 0.1)]), "new", SETTINGS)
    assert not finding.drifted
    alone = two_sample.compare(cloud([parts[0], ("unlabelled", "new", "w", sites[1])]), "new", SETTINGS)
    assert (alone.rule, alone.drifted) == ("images", True)


def test_the_bound_is_that_of_one_more_normal_number() -> None:
    """Against draws: of five roots and a sixth, the sixth passes the bound of the five with the probability asked for."""
    rng = np.random.default_rng(0)
    roots = 10 + rng.normal(size=(400, 6))
    passed = np.mean([six[5] ** 2 > energy_distance.next_bound(six[:5] ** 2, 0.1) for six in roots])
    assert 0.06 < passed < 0.14
    # Student's 0.99 quantile at 4 degrees of freedom is 3.747; mean 2, deviation 1, one more: sqrt(6 / 5).
    five = np.array([2 - np.sqrt(2), 2, 2, 2, 2 + np.sqrt(2)])
    assert energy_distance.next_bound(five**2, 0.01) ** 0.5 == pytest.approx(2 + 3.747 * np.sqrt(1.2), rel=0.03)


def test_moved_columns_are_found_and_the_others_are_not_blamed() -> None:
    rng = np.random.default_rng(0)
    units, member = np.arange(60), np.arange(60) >= 40
    alarms = 0
    for _ in range(60):
        values = rng.normal(size=(60, 8)) * [1, 1, 1, 1, 5, 5, 5, 5]
        drawn = energy_distance.permuted(units, member, 99, rng)
        alarms += (energy_distance.moved(values, drawn, member) < 0.05).any()
        values[member, 6] += 12
        p = energy_distance.moved(values, drawn, member)
        assert p[6] == pytest.approx(0.01)
        assert np.delete(p, 6).min() > 0.01
    assert alarms <= 9  # 5 % of 60 is 3: for all eight columns together


def test_the_unusual_images_are_those_far_from_every_one_of_the_reference() -> None:
    rng = np.random.default_rng(0)
    # Two clusters: the point between them is near their mean and far from every image.
    base = np.concatenate([rng.normal(size=(20, 2)), rng.normal(size=(20, 2)) + 40])
    new = np.array([[0.0, 0.0], [20.0, 20.0], [40.0, 40.0], [41.0, 60.0]])
    points = cloud([("labelled", "base", "", base), ("unlabelled", "new", "", new), ("unlabelled", "old", "", new)])
    far = plots.farthest(points, ["new"], 3)
    assert [item.row for item in far[:2]] == [41, 43]
    assert {item.dump for item in far} == {"new"}
    near = np.sort(np.linalg.norm(base[:, None] - base[None], axis=2), axis=1)[:, 1:6].mean(1)
    away = np.sort(np.linalg.norm(base - new[1], axis=1))[:5].mean() / np.median(near)
    assert far[0].distance == pytest.approx(away)
    assert far[0].distance > 5 > far[2].distance
    assert plots.farthest(points, ["gone"]) == []


def test_without_groups_images_are_permuted() -> None:
    rng = np.random.default_rng(4)
    parts = [
        ("labelled", "base", "", rng.normal(size=(40, 3))),
        ("unlabelled", "new", "", rng.normal(size=(20, 3)) + 2),
    ]
    finding = two_sample.compare(cloud(parts), "new", SETTINGS)
    assert (finding.rule, finding.drifted) == ("images", True)


def test_permutations_move_whole_units() -> None:
    units, member = np.array([0, 0, 1, 1, 1, 2, 3]), np.array([0, 0, 1, 1, 1, 0, 0], bool)
    drawn = energy_distance.permuted(units, member, 50, np.random.default_rng(0))
    for row in drawn:
        inside = {int(u) for u in units[row]}
        assert len(inside) == 1
        assert row.sum() == (units == inside.pop()).sum()
    assert len(drawn) == len({tuple(row) for row in drawn}) == 3  # each of the others once, and not the one given


@pytest.mark.parametrize("count", [50, 454, 999])
def test_few_labelings_are_drawn_without_repetition(count: int) -> None:
    units, member = np.arange(15), np.arange(15) >= 12
    drawn = energy_distance.permuted(units, member, count, np.random.default_rng(0))
    assert len({tuple(row) for row in drawn}) == len(drawn) == min(count, 454)  # of 15 over 3, less the one given
    assert (drawn.sum(1) == 3).all()
    assert not (drawn == member).all(1).any()
    assert len(energy_distance.permuted(np.arange(60), np.arange(60) >= 40, count, np.random.default_rng(0))) == count


def test_descriptor_sees_light_colour_and_texture_but_not_noise_of_sampling() -> None:
    rng = np.random.default_rng(0)
    day = [predictions.descriptor(tiny_project.scene(rng, 64, 96)[0]) for _ in range(12)]
    night = [predictions.descriptor(tiny_project.scene(rng, 64, 96, dark=True)[0]) for _ in range(12)]
    assert day[0].shape == (80,)
    within = np.mean([np.linalg.norm(a - b) for a in day for b in day])
    between = np.mean([np.linalg.norm(a - b) for a in day for b in night])
    assert between > 1.5 * within
    flat = np.full((50, 50, 3), 100, np.uint8)
    assert predictions.descriptor(flat)[:64].max() == 1  # all pixels in one bin each
    np.testing.assert_allclose((predictions.descriptor(flat)[:64].reshape(4, 16) ** 2).sum(1), 1)
    assert np.isfinite(predictions.descriptor(np.zeros((1, 1, 3), np.uint8))).all()
    assert np.isfinite(predictions.descriptor(np.zeros((2, 900, 3), np.uint8))).all()


def test_no_later_dump_means_nothing_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_project.write_data(tmp_path, [("labelled", "base", "a", 2), ("unlabelled", "base", "b", 2)])
    tiny_project.write_params(tmp_path)
    (tmp_path / "data/ingested/images.tar").unlink()  # not even read
    assert marginalia("stage", "screen") == 0
    said = atomic.read_json(Path("reports/screen.json"))
    assert (said["dumps"], said["drifted"]) == ({}, [])
    assert Path("reports/screen.pass").read_bytes() == b"base\n"
    with Image.open("reports/screen/unusual.jpg") as page:  # the stage promises one
        assert page.format == "JPEG"


@pytest.mark.parametrize(("drift_p", "fewest"), [(0.01, 100), (0.05, 20), (0.003, 333), (0.5, 2)])
def test_too_few_permutations_to_flag_anything_are_refused(drift_p: float, fewest: int) -> None:
    """Even a dump from another world gets p = 1 / (1 + permutations) at least."""
    rng = np.random.default_rng(0)
    parts = singles("labelled", "base", rng.normal(size=(30, 4)))
    parts += singles("unlabelled", "new", rng.normal(size=(30, 4)) + 100.0)
    enough = config.Pool.model_construct(permutations=fewest, drift_p=drift_p)
    assert two_sample.compare(cloud(parts), "new", enough).drifted
    with pytest.raises(predictions.PoolError, match=rf"set it to {fewest} or more"):
        two_sample.compare(cloud(parts), "new", config.Pool.model_construct(permutations=fewest - 1, drift_p=drift_p))


def test_missing_pool_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_project.write_params(tmp_path)
    assert marginalia("stage", "drift") == 1
    assert "run the predict stage" in capsys.readouterr().err
