"""Which of a bundle's options runs: by name or not at all, "auto" only what parity admitted and this machine can do."""

import importlib.util
import threading
from pathlib import Path

import numpy as np
import onnx
import pytest

from export.bundle import bundle
from export.bundle.manifest import Manifest, Option
from export.runtime import cpu, runtime, sessions
from tests.support import tiny_onnx

HAS_OPENVINO = importlib.util.find_spec("openvino") is not None
needs_openvino = pytest.mark.skipif(not HAS_OPENVINO, reason="openvino is not installed (extra `openvino`)")

FP32 = Option(runtime="onnxruntime", device="cpu", precision="fp32", speedup=1.0)
INT8 = Option(runtime="onnxruntime", device="cpu", precision="int8", file="model.int8.onnx", speedup=2.0)
BF16 = Option(runtime="openvino", device="cpu", precision="bf16", speedup=1.5)
CUDA = Option(runtime="onnxruntime", device="cuda", precision="fp16", file="model.fp16.onnx", speedup=1.2)


def names(found: list[Option]) -> list[str]:
    return [f"{o.provider} {o.precision}" for o in found]


def told(*options: Option, rejected: tuple[str, ...] = ()) -> Manifest:
    """A manifest with these options; its models are not looked at."""
    return Manifest.model_construct(options=options, rejected=rejected)


def test_auto_is_the_fastest_judged_option_with_cards_first() -> None:
    every = told(FP32, INT8, BF16, CUDA)
    # fp32 on a card that parity has not seen is the same network; OpenVINO's fp32 was not asked for
    assert names(runtime.candidates(every, "auto", "auto")) == [
        "cuda fp16", "cuda fp32", "cpu int8", "openvino bf16", "cpu fp32",
    ]  # fmt: skip
    assert names(runtime.candidates(every, "cpu", "auto")) == ["cpu int8", "cpu fp32"]
    assert names(runtime.candidates(every, "auto", "fp32")) == ["cuda fp32", "cpu fp32"]
    assert names(runtime.candidates(every, "openvino", "auto")) == ["openvino bf16", "openvino fp32"]
    assert names(runtime.candidates(told(), "auto", "auto")) == ["cuda fp32", "cpu fp32"]


def test_what_parity_found_wrong_never_runs() -> None:
    wrong = told(FP32, rejected=("onnxruntime cuda fp32", "openvino cpu fp32"))
    assert names(runtime.candidates(wrong, "auto", "auto")) == ["cpu fp32"]
    for provider in ("cuda", "openvino"):
        with pytest.raises(runtime.ProviderError, match="parity found onnxruntime cuda fp32, openvino cpu fp32 wrong"):
            runtime.candidates(wrong, provider, "fp32")  # type: ignore[arg-type]


def test_a_lossy_option_nobody_judged_is_taken_by_name_only() -> None:
    draft = told(*(o.model_copy(update={"speedup": None}) for o in (FP32, INT8, BF16)))
    assert names(runtime.candidates(draft, "auto", "auto")) == ["cuda fp32", "cpu fp32"]
    assert names(runtime.candidates(draft, "cpu", "auto")) == ["cpu fp32"]
    assert names(runtime.candidates(draft, "cpu", "int8")) == ["cpu int8"]
    assert names(runtime.candidates(told(), "openvino", "fp32")) == ["openvino fp32"]


def test_what_a_bundle_lacks_is_refused_with_what_it_has() -> None:
    with pytest.raises(
        runtime.ProviderError, match=r"nothing for provider 'cpu' in precision 'int8'; it has .*cpu fp32"
    ):
        runtime.candidates(told(FP32), "cpu", "int8")


def two(folder: Path) -> bundle.Bundle:
    """A bundle whose int8 file is another network (threshold 10): answers tell which file ran."""
    return tiny_onnx.write(folder, others={"model.int8.onnx": tiny_onnx.model(10)}, options=[FP32, INT8])


IMAGE = np.full((1, 16, 16, 3), (5, 60, 7), np.uint8)  # green; darker than the fp32 file's threshold of 100


def test_the_named_precision_runs_its_own_file(tmp_path: Path) -> None:
    opened = two(tmp_path / "b")
    for precision, expected in (("fp32", 0), ("int8", 2)):
        chosen = runtime.Runtime(opened, provider="cpu", precision=precision)  # type: ignore[arg-type]
        assert (chosen.provider, chosen.precision) == ("cpu", precision)
        assert set(chosen.run(IMAGE)[0].ravel()) == {expected}


def test_auto_takes_the_fastest_admitted_form_on_any_processor(tmp_path: Path) -> None:
    chosen = runtime.Runtime(two(tmp_path / "b"), provider="cpu")
    assert (chosen.precision, chosen.passed_over) == ("int8", {})
    assert set(chosen.run(IMAGE)[0].ravel()) == {2}


def test_machine_facts_come_from_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "cpuinfo"
    monkeypatch.setattr(cpu, "CPUINFO", info)
    assert (cpu.flags(), cpu.name()) == (set(), "unknown processor")
    assert cpu.cores() >= 1
    info.write_text("processor : 0\nmodel name : A\nFeatures : fp asimddp\n\nprocessor : 1\nmodel name : A\n\n")
    assert cpu.flags() == {"fp", "asimddp"}
    assert cpu.name() == "A"


def test_every_batch_is_cut_into_the_fixed_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = runtime.Runtime(tiny_onnx.write(tmp_path / "b"), provider="cpu", threads=1)
    sizes: list[int] = []
    inner = opened._session.run

    def watch(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        sizes.append(len(images))
        return inner(images)

    monkeypatch.setattr(opened._session, "run", watch)
    images = np.random.default_rng(0).integers(0, 256, (15, 16, 32, 3), dtype=np.uint8)
    label, confidence = opened.run(images)
    assert sizes == [8, 4, 2, 1]
    wanted = tiny_onnx.expected(images)
    assert np.array_equal(label, wanted[0])
    assert np.array_equal(confidence, wanted[1])


@needs_openvino
def test_openvino_answers_as_the_graph_does_from_several_threads(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    opened = runtime.Runtime(tiny_onnx.write(tmp_path / "b"), provider="openvino", precision="fp32", threads=1)
    assert (opened.provider, opened.precision) == ("openvino", "fp32")
    rng = np.random.default_rng(1)
    batches = [rng.integers(0, 256, (n, 16 * h, 32, 3), dtype=np.uint8) for n, h in [(1, 1), (2, 3), (1, 2)] * 4]
    with ThreadPoolExecutor(4) as pool:
        for images, (label, confidence) in zip(batches, pool.map(opened.run, batches), strict=True):
            wanted = tiny_onnx.expected(images)
            assert np.array_equal(label, wanted[0])
            assert np.array_equal(confidence, wanted[1])


@needs_openvino
def test_openvino_keeps_buffers_for_runs_at_once_not_for_threads(tmp_path: Path) -> None:
    session = sessions.OpenVino(tiny_onnx.write(tmp_path / "b").read_model(), "fp32", 1)
    images = np.zeros((1, 16, 32, 3), np.uint8)
    for _ in range(5):
        thread = threading.Thread(target=session.run, args=(images,))
        thread.start()
        thread.join()
    assert len(session._idle) == 1


def test_a_missing_runtime_is_refused_by_name_and_passed_over_by_auto(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "openvino" else real(name, *a))
    opened = tiny_onnx.write(tmp_path / "b", options=[FP32, BF16])
    with pytest.raises(runtime.ProviderError, match="openvino is not installed"):
        runtime.Runtime(opened, provider="openvino", precision="bf16")
    chosen = runtime.Runtime(opened, provider="auto")
    assert chosen.provider in ("cpu", "cuda")
    assert chosen.passed_over["openvino cpu bf16"] == "openvino is not installed"
    assert "openvino bf16" not in names(runtime.options(opened))
    assert "cpu fp32" in names(runtime.options(opened))


def test_the_id_follows_models_and_options_but_not_measured_speeds(tmp_path: Path) -> None:
    ids = {
        "plain": tiny_onnx.write(tmp_path / "a").manifest.id,
        "two": two(tmp_path / "b").manifest.id,
        "other int8": tiny_onnx.write(
            tmp_path / "c", others={"model.int8.onnx": tiny_onnx.model(11)}, options=[FP32, INT8]
        ).manifest.id,
        "bf16 too": tiny_onnx.write(
            tmp_path / "d", others={"model.int8.onnx": tiny_onnx.model(10)}, options=[FP32, INT8, BF16]
        ).manifest.id,
    }
    assert len(set(ids.values())) == 4
    slower = [FP32, INT8.model_copy(update={"speedup": 1.4, "agreement": 0.99})]
    behind = [FP32, INT8.model_copy(update={"speedup": 0.9})]  # auto would take the other one: other answers
    others = {"model.int8.onnx": tiny_onnx.model(10)}
    assert tiny_onnx.write(tmp_path / "f", others=others, options=behind).manifest.id != ids["two"]
    unjudged = [o.model_copy(update={"speedup": None}) for o in (FP32, INT8)]
    assert tiny_onnx.write(tmp_path / "g", others=others, options=unjudged).manifest.id != ids["two"]
    again = tiny_onnx.write(tmp_path / "e", others={"model.int8.onnx": tiny_onnx.model(10)}, options=slower)
    assert again.manifest.id == ids["two"]


def test_models_and_options_must_match(tmp_path: Path) -> None:
    with pytest.raises(bundle.BundleError, match=r"model\.int8\.onnx: the options"):
        tiny_onnx.write(tmp_path / "a", others={"model.int8.onnx": tiny_onnx.model(10)}, options=[FP32])
    with pytest.raises(bundle.BundleError, match=r"model\.int8\.onnx: the options"):
        tiny_onnx.write(tmp_path / "b", options=[FP32, INT8])
    opened = two(tmp_path / "c")
    (tmp_path / "c/model.int8.onnx").unlink()
    with pytest.raises(bundle.BundleError, match=r"model\.int8\.onnx: missing"):
        bundle.verify(tmp_path / "c")
    with pytest.raises(bundle.BundleError, match=r"model\.fp16\.onnx: this bundle has no such model"):
        opened.read_model("model.fp16.onnx")


def test_a_further_model_may_not_point_outside_either(tmp_path: Path) -> None:
    proto = onnx.load_from_string(tiny_onnx.model(10))
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secret")
    with pytest.raises(bundle.BundleError, match=r"model\.int8\.onnx: refers to other files"):
        tiny_onnx.write(tmp_path / "b", others={"model.int8.onnx": proto.SerializeToString()}, options=[FP32, INT8])


@pytest.mark.parametrize(
    "changes",
    [
        {"file": "model.int8.onnx"},
        {"precision": "fp16"},
        {"runtime": "tensorrt"},
        {"runtime": "openvino", "precision": "int8"},
    ],
    ids=str,
)
def test_only_ways_that_exist_are_options(changes: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="unsupported combination of runtime, device, precision and file"):
        Option.model_validate(FP32.model_dump() | changes)


def test_an_option_stands_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="an option is there twice"):
        tiny_onnx.write(tmp_path / "b", options=[FP32, FP32.model_copy(update={"speedup": 2.0})])


def test_a_model_that_will_not_load_is_passed_over_by_auto_and_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newer = onnx.load_from_string(tiny_onnx.model(10))
    newer.ir_version = 99
    opened = tiny_onnx.write(
        tmp_path / "b", others={"model.int8.onnx": newer.SerializeToString()}, options=[FP32, INT8]
    )
    chosen = runtime.Runtime(opened)
    assert chosen.precision == "fp32"
    assert "onnxruntime cpu int8" in chosen.passed_over
    with pytest.raises(bundle.BundleError, match=r"model\.int8\.onnx: cannot be loaded"):
        runtime.Runtime(opened, provider="cpu", precision="int8")


def test_a_failed_call_fails_and_is_not_answered_by_another_provider(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime's Python class turns to the CPU after a provider's failure unless it is told not to."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    opened = runtime.Runtime(tiny_onnx.write(tmp_path / "b"), provider="cpu")

    inner = opened._session._session._sess  # type: ignore[attr-defined]

    class Failing:
        def __getattr__(self, name: str) -> object:
            return getattr(inner, name)

        def run(self, *args: object) -> None:
            raise state.EPFail("the card went away")

    monkeypatch.setattr(opened._session._session, "_sess", Failing())
    with pytest.raises(state.EPFail, match="the card went away"):
        opened.run(IMAGE)
