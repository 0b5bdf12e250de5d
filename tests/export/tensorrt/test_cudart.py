"""export.tensorrt.cudart: where the library is looked for, and that it works where it is there."""

from pathlib import Path

import pytest

from export.tensorrt import cudart, installation


def test_missing_cuda_library_is_told_with_every_place(tmp_path: Path) -> None:
    (tmp_path / "libcudart.so.13").write_bytes(b"no library")
    with pytest.raises(cudart.CudaError, match=r"libcudart\.so\.13: .*; libno\.so: .*install the extra `gpu`"):
        cudart.open_library([str(tmp_path / "libcudart.so.13"), "libno.so"])
    with pytest.raises(cudart.CudaError, match="cudaMalloc"):  # loads, but is something else
        cudart.open_library(["libc.so.6"])


def test_pip_folder_is_found_without_importing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("cu13/lib", "cuda_runtime/lib"):
        (tmp_path / "nvidia" / folder).mkdir(parents=True)
        (tmp_path / "nvidia" / folder / "libcudart.so.13").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    places = cudart.places()
    assert places[:2] == ["libcudart.so.13", "libcudart.so.12"]
    assert {str(tmp_path / "nvidia" / f / "libcudart.so.13") for f in ("cu13/lib", "cuda_runtime/lib")} < set(places)


def test_real_cuda_runtime_answers_by_name() -> None:
    """NVIDIA's own library where it is installed: with a card it works, without one it says why."""
    try:
        cudart.library()
    except cudart.CudaError as error:
        pytest.skip(f"no CUDA runtime: {error}")
    assert cudart.version().split(".")[0] in ("12", "13")
    if not installation.look().cards:
        with pytest.raises(cudart.CudaError, match=r"^cudaStreamCreateWithFlags: .+ \(CUDA error \d+\)$"):
            cudart.Stream()
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
