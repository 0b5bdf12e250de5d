"""TensorRT engines: kept beside each other in a cache folder, run as sessions, built for a bundle by one command.

    python -m export.engines BUNDLE [--precision fp32 ...] [--rebuild]

An engine fits one card, driver and TensorRT; it never goes into a bundle. The cache only saves time: whatever is wrong
with it, the engine is built anew. Its checksums guard against accidents, so the folder must be as safe as the code.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import statistics
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from export import bundle, cuda, tensorrt
from export.tensorrt import EngineError, Profile
from pipeline import files

HERE = Path(".marginalia/engines")
KEPT_ASIDE, KEPT = 4, 32  # files of each kind in a cache folder; the oldest go first
WAIT = 1800.0  # seconds for another process that builds the same engine; a large network takes minutes
SHAPES = 16  # input shapes whose buffers and graphs are kept
# The precisions of a bundle's files. model.int8.onnx is not among them: its unsigned form is for CPUs.
FILES = {"fp32": "model.onnx", "tf32": "model.onnx", "fp16": "model.fp16.onnx", "int8": "model.int8-tensorrt.onnx"}
# Share of labels equal to ONNX Runtime's on noise, where near-ties abound. Lower means a gross fault, such as a wrong
# layout; how good a precision is on real images is for parity to say.
FLOORS = {"fp32": 0.999, "tf32": 0.98, "fp16": 0.98, "int8": 0.9}
_TENSORS = ("image", "label", "confidence")
_HEADER_LIMIT = 1 << 16
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Key:
    """All that an engine depends on. Another value of any field is another engine."""

    module: str
    version: str
    card: str
    compute_capability: str
    driver: str
    onnx_sha256: str
    precision: str
    profile: Profile
    recipe: int = tensorrt.RECIPE

    @property
    def about(self) -> dict[str, Any]:
        """The key as it comes back from JSON."""
        about: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return about

    @property
    def digest(self) -> str:
        """The engine's file name without its suffix."""
        return hashlib.sha256(json.dumps(self.about, sort_keys=True).encode()).hexdigest()[:32]

    @property
    def machine(self) -> dict[str, Any]:
        """The part that timings of kernels depend on."""
        return {k: self.about[k] for k in ("module", "version", "card", "compute_capability", "driver")}


class _Unusable(Exception):
    """A file of the cache that must not be used, and how to call it: "damaged" or "stale"."""

    def __init__(self, kind: Literal["damaged", "stale"], reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


def _read(path: Path, about: dict[str, Any]) -> bytes:
    """The payload of a file written by `_write` for `about`. Raises _Unusable, and OSError if it cannot be read."""
    with path.open("rb") as file:
        line, payload = file.readline(_HEADER_LIMIT), file.read()
    try:
        header = json.loads(line)
        wanted, found = header["sha256"], header["about"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise _Unusable("damaged", f"no readable header ({error!r})") from error
    if files.sha256(payload) != wanted:
        raise _Unusable("damaged", f"{len(payload)} bytes do not match their checksum")
    if found != about:
        other = sorted(k for k in about if not isinstance(found, dict) or found.get(k) != about[k])
        raise _Unusable("stale", f"made for another {', '.join(other) or 'key'}")
    return payload


def _write(path: Path, about: dict[str, Any], payload: bytes) -> None:
    """One line of JSON, then the payload: in one file, so that they cannot come from two writers. Never raises."""
    header = json.dumps({"sha256": files.sha256(payload), "about": about}, sort_keys=True)
    try:
        with files.replacing(path) as file:
            file.write(header.encode() + b"\n")
            file.write(payload)
    except OSError as error:
        _log.warning("%s: cannot be kept (%s); it will be built again next time", path, error)


@contextlib.contextmanager
def _locked(path: Path, wait: float) -> Iterator[None]:
    """Hold a lock file against other processes and threads; it ends with its holder, however that ends.

    After `wait` seconds, or where locks do not work, go on without it: files appear by rename, so two builders at once
    only do the work twice.
    """
    with contextlib.ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(path.open("a"))
            until = time.monotonic() + wait
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= until:
                        _log.warning("%s: still held after %g s; building without it", path, wait)
                        break
                    time.sleep(0.05)
        except OSError as error:
            _log.warning("%s: cannot be locked (%s); going on without it", path, error)
        yield


def _prune(folder: Path, pattern: str, keep: int) -> None:
    """Remove all but the `keep` files last touched. Another process may do the same at the same time."""
    with contextlib.suppress(OSError):
        for old in sorted(folder.glob(pattern), key=lambda p: p.stat().st_mtime_ns, reverse=True)[keep:]:
            old.unlink(missing_ok=True)


def default_folder() -> Path:
    """`.marginalia/engines` here, or the user's cache folder where that cannot be written."""
    try:
        HERE.mkdir(parents=True, exist_ok=True)
        if os.access(HERE, os.W_OK):
            return HERE
    except OSError:
        pass
    named = Path(os.environ.get("XDG_CACHE_HOME") or "")  # a relative one is to be ignored, says the specification
    try:
        return (named if named.is_absolute() else Path.home() / ".cache") / "marginalia" / "engines"
    except RuntimeError:  # a user without a home
        return HERE


@dataclasses.dataclass(frozen=True)
class Cache:
    """A folder of engines that several processes may share. Trouble with it is logged, never raised."""

    folder: Path
    wait: float = WAIT

    def path(self, key: Key) -> Path:
        return self.folder / f"{key.digest}.engine"

    def _set_aside(self, path: Path, trouble: _Unusable) -> None:
        """Keep a bad file for whoever asks what happened; remove it where even that fails."""
        _log.warning("%s: %s (%s); set aside, built anew", path, trouble.kind, trouble)
        aside = path.with_name(f"{path.name}.{time.time_ns()}.{trouble.kind}")
        with contextlib.suppress(OSError):
            path.replace(aside)
            os.utime(aside)
        _prune(self.folder, f"*.{trouble.kind}", KEPT_ASIDE)

    def _fetch(self, path: Path, about: dict[str, Any]) -> bytes | None:
        try:
            return _read(path, about)
        except FileNotFoundError:
            return None
        except _Unusable as trouble:
            self._set_aside(path, trouble)
        except OSError as error:
            _log.warning("%s: cannot be read (%s); built anew", path, error)
        return None

    def obtain(
        self,
        key: Key,
        make: Callable[[bytes], tensorrt.Built],
        load: Callable[[bytes], Any],
        *,
        rebuild: bool = False,
    ) -> tuple[Any, bool]:
        """The loaded engine for `key`, and whether its file was used.

        Args:
            make: timings of earlier builds on this machine (may be empty) -> engine and timings.
            load: serialised engine -> engine, None when it does not suit this machine after all.
            rebuild: build even if there is a file.

        Raises:
            EngineError: `make` raises it, or what was built just now cannot be loaded.
        """
        path = self.path(key)
        with _locked(path.with_suffix(".lock"), self.wait):
            if not rebuild and (payload := self._fetch(path, key.about)) is not None:
                if (engine := load(payload)) is not None:
                    with contextlib.suppress(OSError):
                        os.utime(path)  # in use: others are removed before it
                    return engine, True
                self._set_aside(path, _Unusable("stale", "TensorRT does not take it"))
            _prune(self.folder, f".{path.name}.*.part", 0)  # of a builder that was killed: nobody else holds the lock
            machine = hashlib.sha256(json.dumps(key.machine, sort_keys=True).encode()).hexdigest()[:32]
            timings = self.folder / f"{machine}.timings"
            built = make(self._fetch(timings, key.machine) or b"")
            if (engine := load(built.engine)) is None:
                raise EngineError(f"an engine built just now cannot be loaded by {key.module} {key.version}")
            _write(path, key.about, built.engine)
            if built.timings:
                _write(timings, key.machine, built.timings)
            _prune(self.folder, "*.engine", KEPT)
            return engine, False


class _Slot:
    """Everything for one input shape: a context, buffers on both sides, and the graph once captured.

    A context of its own, because a captured graph holds the addresses and sizes its context had.
    """

    def __init__(self, engine: Any, module: Any, scratch: cuda.DeviceMemory, shape_NHWC: tuple[int, ...]) -> None:
        self.context = engine.create_execution_context(module.ExecutionContextAllocationStrategy.USER_MANAGED)
        if self.context is None:
            raise EngineError("TensorRT makes no execution context; the card may be out of memory")
        self.context.set_device_memory(scratch.handle, scratch.size)
        shape_NHW = shape_NHWC[:3]
        self.hosts = {n: cuda.PinnedArray(s) for n, s in zip(_TENSORS, (shape_NHWC, shape_NHW, shape_NHW), strict=True)}
        self.devices = {n: cuda.DeviceMemory(host.array.nbytes) for n, host in self.hosts.items()}
        if not self.context.set_input_shape("image", shape_NHWC):
            raise EngineError(f"the engine refuses the input shape {shape_NHWC}")
        for name, memory in self.devices.items():
            if not self.context.set_tensor_address(name, memory.handle):
                raise EngineError(f"the engine has no input or output {name!r}; export the model again")
        self.graph: cuda.Graph | None = None
        self.runs, self.capturable = 0, True

    def enqueue(self, stream: cuda.Stream) -> None:
        stream.to_device(self.devices["image"], self.hosts["image"])
        if not self.context.execute_async_v3(stream.handle):
            raise EngineError("TensorRT refused to run the engine; its log says why")
        for name in _TENSORS[1:]:
            stream.to_host(self.hosts[name], self.devices[name])

    def close(self) -> None:
        self.context = None
        for owned in (self.graph, *self.hosts.values(), *self.devices.values()):
            if owned is not None:
                owned.close()


class EngineSession:
    """A model on the first card. Safe to call from several threads; calls run one after the other.

    `key` says what was built, `cached` whether its file was used, `seconds` what building or loading took. `graphs`
    (may be changed between calls): replay a CUDA graph for shapes that come again.
    """

    def __init__(
        self,
        model: bytes,
        *,
        precision: str,
        profile: Profile,
        cache: Path | None = None,
        module: Any = None,
        name: str = "model.onnx",
        rebuild: bool = False,
    ) -> None:
        """Load `model` (ONNX, called `name` in messages) from the folder `cache` (None: `default_folder`), or build it.

        Raises:
            EngineError: no card, no TensorRT module or CUDA runtime, the model cannot be built, or the card has no
                memory for it; the message says which.
        """
        started = time.perf_counter()
        self.profile = profile
        card = tensorrt.card()
        self._module = module or tensorrt.load()
        self._log = tensorrt.logger(self._module)
        self._runtime = self._module.Runtime(self._log)
        self.key = Key(
            self._module.__name__, self._module.__version__, card.name, card.compute_capability, card.driver,
            files.sha256(model), precision, profile,
        )  # fmt: skip

        def make(timings: bytes) -> tensorrt.Built:
            return tensorrt.build(self._module, model, precision=precision, profile=profile, name=name, timings=timings)

        self._engine, self.cached = Cache(cache or default_folder()).obtain(self.key, make, self._load, rebuild=rebuild)
        self.seconds = time.perf_counter() - started
        self.graphs = True
        self._lock = threading.Lock()
        self._slots: OrderedDict[tuple[int, ...], _Slot] = OrderedDict()
        try:
            self._stream = cuda.Stream()
            # One block for all contexts: they run one after the other. By itself each would take the largest shape's.
            self._scratch = cuda.DeviceMemory(self._engine.device_memory_size_v2)
        except cuda.CudaError as error:
            raise EngineError(f"{name}: built, but cannot be run: {error}") from error

    def _load(self, payload: bytes) -> Any:
        try:
            return self._runtime.deserialize_cuda_engine(payload)
        except (RuntimeError, ValueError, TypeError) as error:  # it answers None, and may also throw
            _log.warning("TensorRT cannot load an engine: %s", error)
            return None

    @property
    def captured(self) -> int:
        """Shapes that a CUDA graph is kept for."""
        return sum(slot.graph is not None for slot in self._slots.values())

    def run(self, images_NHWC: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """uint8 N x H x W x 3 RGB -> uint8 class ids and confidence (0..255), each N x H x W.

        Raises:
            ValueError: wrong type or shape, or outside the profile; the message says which bound.
            EngineError, cuda.CudaError: the card failed; or the session is closed.
        """
        if images_NHWC.dtype != np.uint8 or images_NHWC.ndim != 4 or images_NHWC.shape[3] != 3:
            raise ValueError(f"expected uint8 N x H x W x 3, got {images_NHWC.dtype} {images_NHWC.shape}")
        self.profile.check(images_NHWC.shape[:3])
        with self._lock:
            if self._engine is None:
                raise EngineError("the session is closed; open another")
            slot = self._slot(images_NHWC.shape)
            np.copyto(slot.hosts["image"].array, images_NHWC)
            self._launch(slot)
            self._stream.synchronize()
            slot.runs += 1
            label_NHW, confidence_NHW = (slot.hosts[name].array.copy() for name in _TENSORS[1:])
            return label_NHW, confidence_NHW

    def _slot(self, shape_NHWC: tuple[int, ...]) -> _Slot:
        if shape_NHWC not in self._slots:
            while len(self._slots) >= SHAPES:
                self._slots.popitem(last=False)[1].close()
            self._slots[shape_NHWC] = _Slot(self._engine, self._module, self._scratch, shape_NHWC)
        self._slots.move_to_end(shape_NHWC)
        return self._slots[shape_NHWC]

    def _launch(self, slot: _Slot) -> None:
        """Plainly the first time (TensorRT prepares for a shape then, which cannot be captured), later as a graph."""
        if self.graphs and slot.runs and slot.graph is None and slot.capturable:
            try:
                slot.graph = self._stream.capture(lambda: slot.enqueue(self._stream))
            except (cuda.CudaError, EngineError) as error:
                slot.capturable = False
                _log.warning("no CUDA graph for the input shape %s: %s", slot.hosts["image"].array.shape, error)
        if self.graphs and slot.graph is not None:
            slot.graph.launch(self._stream)
        else:
            slot.enqueue(self._stream)

    def close(self) -> None:
        """Give back all that is on the card. Closing twice does no harm."""
        with self._lock:
            while self._slots:
                self._slots.popitem()[1].close()
            self._engine = self._runtime = None
            self._scratch.close()
            self._stream.close()


def _p50(session: EngineSession, images_NHWC: NDArray[np.uint8], runs: int) -> float:
    """Median milliseconds of a call, copies to the card and back included; the first three are not counted."""
    times = []
    for _ in range(runs + 3):
        started = time.perf_counter()
        session.run(images_NHWC)
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times[3:])


def measure(model: bytes, session: EngineSession, *, runs: int = 50) -> dict[str, Any]:
    """Agreement with ONNX Runtime's CPU and p50 in both ways, on noise of the profile's usual shape."""
    import onnxruntime

    shape = (*session.profile.opt_NHW, 3)
    images_NHWC = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    reference = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    expected_NHW = reference.run(["label"], {"image": images_NHWC})[0]
    session.graphs = False
    plain, label_NHW = _p50(session, images_NHWC, runs), session.run(images_NHWC)[0]
    session.graphs = True
    graph, again_NHW = _p50(session, images_NHWC, runs), session.run(images_NHWC)[0]
    return {
        "shape_NHWC": list(shape),
        "agreement": float((label_NHW == expected_NHW).mean()),
        "agreement_of_graph": float((again_NHW == expected_NHW).mean()),
        "p50_plain_ms": plain,
        "p50_graph_ms": graph if session.captured else None,
    }


def build_all(
    opened: bundle.Bundle, precisions: Sequence[str], profile: Profile, cache: Path, *, rebuild: bool
) -> list[dict[str, Any]]:
    """Build, check and time each precision; a failure is its row's `failure` and does not stop the others."""
    module, rows = tensorrt.load(), []
    for precision in precisions:
        path = opened.folder / FILES[precision]
        model = path.read_bytes()
        row: dict[str, Any] = {"file": path.name, "precision": precision, "failure": None}
        try:
            with contextlib.closing(
                EngineSession(
                    model, precision=precision, profile=profile, cache=cache, module=module, name=str(path),
                    rebuild=rebuild,
                )
            ) as session:  # fmt: skip
                row |= {"key": session.key.about, "cached": session.cached, "seconds": session.seconds}
                row |= {"engine": str(Cache(cache).path(session.key)), **measure(model, session)}
            worst = min(row["agreement"], row["agreement_of_graph"])
            if worst < FLOORS[precision]:
                row["failure"] = f"{path}: agrees with ONNX Runtime on {worst:.4f} of the pixels of noise only"
        except (EngineError, cuda.CudaError) as error:
            row["failure"] = str(error)
        rows.append(row)
    return rows


def _show(rows: list[dict[str, Any]], title: str, console: Console) -> None:
    def cell(row: dict[str, Any], name: str, digits: int) -> str:
        return "-" if row.get(name) is None else f"{row[name]:.{digits}f}"

    table = Table("file", "precision", "took s", "from cache", "agreement", "plain ms", "graph ms", title=title)
    for row in rows:
        times = (cell(row, "p50_plain_ms", 3), cell(row, "p50_graph_ms", 3))
        cached = "-" if "cached" not in row else "yes" if row["cached"] else "no"
        table.add_row(row["file"], row["precision"], cell(row, "seconds", 1), cached, cell(row, "agreement", 5), *times)
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 when every engine was built and agrees, 1 otherwise."""
    parser = argparse.ArgumentParser(
        prog="python -m export.engines", description="Build, check and time a bundle's TensorRT engines on this card."
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--precision", nargs="+", choices=tensorrt.PRECISIONS, help="default: all the bundle has")
    parser.add_argument("--max-batch", type=int, default=tensorrt.MAX_BATCH)
    parser.add_argument("--cache", type=Path, help=f"default: {HERE}, or the user's cache folder")
    parser.add_argument("--report", type=Path, default=Path("reports/engines.json"))
    parser.add_argument("--rebuild", action="store_true", help="build even what the cache has")
    options = parser.parse_args(arguments)
    errors = Console(stderr=True)

    def complain(text: str) -> None:
        errors.print(f"engines: {text}", style="red", markup=False, soft_wrap=True)

    try:
        opened = bundle.open_bundle(options.bundle)
        present = [p for p in tensorrt.PRECISIONS if (opened.folder / FILES[p]).exists()]
        if absent := sorted(set(options.precision or ()) - set(present)):
            raise EngineError(f"{opened.folder / FILES[absent[0]]}: not in this bundle; it has {', '.join(present)}")
        policy = opened.manifest.input
        profile = Profile.of(long_side=policy.long_side, stride=policy.stride, max_batch=options.max_batch)
        found = tensorrt.look()
        if not found.usable:
            for place, answer in found.looked_for.items():
                errors.print(f"  {place}: {answer}", markup=False, highlight=False, soft_wrap=True)
            raise EngineError(found.as_dict()["says"])
        card = tensorrt.card()
        rows = build_all(
            opened, options.precision or present, profile, options.cache or default_folder(), rebuild=options.rebuild
        )
        cuda_version = cuda.version()
    except (EngineError, cuda.CudaError, bundle.BundleError, ValueError) as error:
        complain(str(error))
        return 1
    said = {
        "bundle": opened.manifest.id, "card": dataclasses.asdict(card), "modules": found.modules,
        "cuda_runtime": cuda_version, "engines": rows,
    }  # fmt: skip
    files.write_json(options.report, said)
    _show(rows, f"{card.name}, driver {card.driver}, batch {profile.opt_NHW[0]}", Console())
    for row in rows:
        if row["failure"]:
            complain(row["failure"])
    return int(any(row["failure"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
