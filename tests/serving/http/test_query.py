"""query and responses without a server: what is asked for is validated, named when wrong, and applied."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.http import query, responses
from serving.http.negotiate import VIEWS
from serving.http.requests import Problem
from serving.settings import Settings
from tests.support import tiny_onnx

LIMITS = Settings(max_pixels=1000)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> object:
    classes = [
        {"id": 0, "name": "7", "color": [0, 0, 0]},
        {"id": 3, "name": "tree", "color": [0, 9, 0]},
        {"id": 7, "name": "wa ter", "color": [0, 0, 9]},
    ]
    return tiny_onnx.write(tmp_path_factory.mktemp("bundle") / "b", classes=classes).manifest


def refused(items: list[tuple[str, str]]) -> str:
    with pytest.raises(Problem) as caught:
        query.parse(items, LIMITS)
    assert (caught.value.status, caught.value.code) == (400, "bad-query")
    assert len(str(caught.value)) < 200
    assert str(caught.value).isprintable()
    return str(caught.value)


def test_defaults_and_values() -> None:
    assert query.parse([], LIMITS) == query.Query()
    assert query.Query().model_dump() == {
        "view": None, "classes": None, "min_confidence": 0.0, "size": "image", "tolerance": 1.0, "resolution": "fit",
    }  # fmt: skip
    found = query.parse([("size", "20x50"), ("min_confidence", "1e-1"), ("resolution", "full")], LIMITS)
    assert (found.pixels(), found.min_confidence, found.resolution) == ((50, 20), 0.1, "full")
    assert [query.parse([("view", view)], LIMITS).view for view in VIEWS] == list(VIEWS)
    assert query.parse([("size", "model")], LIMITS).pixels() is None


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("view", "sketch", "'view': must be one of mask, json, geojson"),
        ("min_confidence", "1.01", "'min_confidence': Input should be less than or equal to 1"),
        ("min_confidence", "-0.1", "'min_confidence'"),
        ("min_confidence", "nan", "'min_confidence'"),
        ("min_confidence", "", "'min_confidence'"),
        ("tolerance", "51", "'tolerance'"),
        ("tolerance", "inf", "'tolerance'"),
        ("resolution", "half", "'resolution': Input should be 'fit' or 'full'"),
        ("size", "20", "'size': must be image, model or WIDTHxHEIGHT"),
        ("size", "20x", "'size'"),
        ("size", "20X50", "'size'"),
        ("size", "٣x5", "'size'"),
        ("size", "20x50\n", "'size'"),
        ("size", "0x50", "'size': sides of 1"),
        ("size", "20x51", "'size': sides of 1 to 65500, and at most 1000 pixels"),
        ("size", "99999x0", "'size': sides of 1"),
        ("classes", "", "'classes': name classes or ids"),
        ("classes", "tree,,7", "'classes'"),
        ("classes", "x" * 8001, "'classes' is longer"),
        ("clases", "tree", "unknown query parameter 'clases'; did you mean 'classes'?"),
        ("q\x1b[31m\n", "1", r"unknown query parameter 'q\x1b[31m\n'; known: view, classes"),
        ("é" * 100, "1", "known: view"),
    ],
)
def test_wrong_parameters_are_named_and_not_repeated(name: str, value: str, said: str) -> None:
    assert said in refused([(name, value)])


def test_a_parameter_is_given_once() -> None:
    assert "'view' is given twice" in refused([("view", "mask"), ("view", "mask")])


def test_classes_by_name_then_by_id(manifest: object) -> None:
    def ids(text: str) -> object:
        return query.Query(classes=text).class_ids(manifest)

    assert query.Query().class_ids(manifest) is None
    assert ids("tree, wa ter") == {3, 7}
    assert ids("7") == {0}  # a class of that name goes before the id
    assert ids("3,0") == {0, 3}
    for wrong, said in (
        ("trees", "no class 'trees' here; did you mean 'tree'?"),
        ("5,tree", "'5' here; GET"),
        ("\x07", "x07"),
    ):
        with pytest.raises(Problem, match=said.replace("?", r"\?")) as caught:
            ids(wrong)
        assert (caught.value.status, caught.value.code) == (400, "bad-query")
        assert str(caught.value).isprintable()


@pytest.mark.parametrize("ids", [None, frozenset(), frozenset({1, 2})])
@pytest.mark.parametrize("floor", [0.0, 0.2, 0.5, 0.999, 1.0])
def test_select_is_the_plain_loop(ids: frozenset[int] | None, floor: float) -> None:
    rng = np.random.default_rng(3)
    label_HW = rng.integers(0, 4, (17, 16), dtype=np.uint8)
    confidence_HW = rng.permutation(np.arange(272) % 256).astype(np.uint8).reshape(17, 16)  # every byte is there
    want = label_HW.copy()
    for y, x in np.ndindex(*want.shape):
        if (ids is not None and label_HW[y, x] not in ids) or confidence_HW[y, x] / 255 < floor:
            want[y, x] = 99
    np.testing.assert_array_equal(query.select(label_HW, confidence_HW, ids, floor, 99), want)


def test_nothing_asked_costs_nothing() -> None:
    label_HW = np.ones((3, 3), np.uint8)
    assert query.select(label_HW, label_HW, None, 0.0, 255) is label_HW


@given(st.integers(0, 255))
@settings(max_examples=60, deadline=None)
def test_a_confidence_that_was_answered_is_not_below_itself(byte: int) -> None:
    assert query.lowest_byte(byte / 255) == byte


@pytest.mark.parametrize("chunk", [1, 50, 1 << 20])
def test_summaries_come_from_one_tally(manifest: object, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(responses, "_CHUNK", chunk)
    rng = np.random.default_rng(4)
    label_hw = rng.choice(np.array([0, 3, 7], np.uint8), (20, 31))
    confidence_hw = rng.integers(0, 256, (20, 31), dtype=np.uint8)
    count = responses.tally(label_hw, confidence_hw)
    for ids, floor in ((None, 0), (frozenset({3, 7}), 0), (frozenset({0}), 100), (frozenset(), 0), (None, 256)):
        found = responses.summarise(count, manifest, ids, floor)
        kept = np.isin(label_hw, list({0, 3, 7} if ids is None else ids)) & (confidence_hw >= floor)
        assert found.shares == {i: pytest.approx(((label_hw == i) & kept).mean()) for i in (0, 3, 7)}
        assert set(found.means) == set(np.unique(label_hw[kept]).tolist())
        for i, mean in found.means.items():
            assert mean == pytest.approx(confidence_hw[kept & (label_hw == i)].mean() / 255)
        assert found.confidence == (pytest.approx(confidence_hw[kept].mean() / 255) if kept.any() else 0)


def test_the_areas_header_is_short_and_quoted() -> None:
    many = {f"class {i}": (i + 1) / 10_000 for i in range(100)}
    header = responses.class_areas(many)
    assert header.startswith("class%2099=0.0100, class%2098=0.0099, ")
    assert header.count("=") == responses.MOST_AREAS
    assert responses.class_areas({"a,=\r\né": 0.5, "none": 0.00004}) == "a%2C%3D%0D%0A%C3%A9=0.5000"
