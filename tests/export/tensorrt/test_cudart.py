"""export.tensorrt.cudart on NVIDIA's own bindings, where they are installed."""

import sys

import pytest

from export.tensorrt import cudart, installation


def test_missing_bindings_are_told_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(cudart.CudaError, match=r"cuda\.bindings.*install the extra `gpu`"):
        cudart.library.__wrapped__()


def test_real_cuda_runtime_answers_by_name() -> None:
    """NVIDIA's own library where it is installed: with a card it works, without one every call says why."""
    try:
        cudart.library()
    except cudart.CudaError as error:
        pytest.skip(f"no CUDA runtime: {error}")
    assert cudart.version().split(".")[0] in ("12", "13")
    if not installation.look().cards:
        with pytest.raises(cudart.CudaError, match=r"^cudaStreamCreateWithFlags: .+ \(CUDA error \d+\)$"):
            cudart.Stream()
        with pytest.raises(cudart.CudaError, match=r"^cudaMalloc: .+ \(CUDA error \d+\)$"):
            cudart.DeviceMemory(1000)
        with pytest.raises(cudart.CudaError, match=r"^cudaHostAlloc: .+ \(CUDA error \d+\)$"):
            cudart.PinnedArray((1000,))
        return
    stream = cudart.Stream()
    there, here, back = cudart.DeviceMemory(1000), cudart.PinnedArray((1000,)), cudart.PinnedArray((1000,))

    def both_ways() -> None:
        stream.to_device(there, here)
        stream.to_host(back, there)

    graph = stream.capture(both_ways)
    for value in (7, 9):
        here.array[:] = value
        graph.launch(stream)
        stream.synchronize()
        assert (back.array == value).all()
