"""The server that the load ratios start: a bundle as champion, a twin to swap it with, and the same work in process."""

import argparse
import contextlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from PIL import Image

from export.bundle import bundle
from export.bundle.manifest import MODEL
from export.runtime import cpu, runtime
from serving.http import negotiate, segment
from serving.settings import Settings
from tests.support import live_server, tiny_onnx
from tests.support.image_files import save
from tests.support.live_server import Server


def photograph(height: int, width: int) -> bytes:
    """A JPEG that packs like a photograph: smooth shapes and noise."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return save(Image.fromarray(np.clip(smooth + rng.normal(0, 6, smooth.shape), 0, 255).astype(np.uint8)), "JPEG")


def twin(original: bundle.Bundle, folder: Path) -> bundle.Bundle:
    """A bundle that answers alike, at the same speed, under another id: its model has one more remark in it."""
    told = original.manifest
    model = onnx.load_model_from_string(original.read_model())
    onnx.helper.set_model_props(model, {"twin": "of " + told.id})
    models = {name: original.read_model(name) for name in original.models} | {MODEL: model.SerializeToString()}
    return bundle.create(folder, models, told.description(), card=f"# twin of {told.id}\n")


@dataclass(frozen=True)
class Served:
    """A running server, the pointer's folder, and the two bundles it may point to; the first is served."""

    server: Server
    champions: Path
    first: bundle.Bundle
    second: bundle.Bundle

    def point(self, to: bundle.Bundle | Path) -> None:
        live_server.point(self.champions, to if isinstance(to, Path) else to.folder)


@contextlib.contextmanager
def serve(given: Path | None, **settings: str) -> Iterator[Served]:
    """A server with settings MARGINALIA_<NAME>; without a bundle, a toy graph that shows the overhead alone."""
    with tempfile.TemporaryDirectory(prefix="marginalia-load-") as temporary:
        champions = Path(temporary) / "champions"
        if given is None:
            first = tiny_onnx.write(champions / "first" / "bundle", long_side=512)
        else:
            shutil.copytree(given, champions / "first" / "bundle")
            first = bundle.open_bundle(champions / "first" / "bundle")
        second = twin(first, champions / "second" / "bundle")
        live_server.point(champions, first.folder)
        told = {"champions": str(champions / "champion.json"), "threads": str(cpu.cores())} | settings
        server = live_server.start({f"MARGINALIA_{name.upper()}": value for name, value in told.items()})
        try:
            yield Served(server, champions, first, second)
        finally:
            server.stop()
            shutil.rmtree(server.folder, ignore_errors=True)


def in_process(opened: bundle.Bundle, data: bytes) -> Callable[[], object]:
    """One request's decode, run and encode in this process, warmed up."""
    here, settings, kind = runtime.Runtime(opened), Settings(), negotiate.KINDS[0]
    here.warm_up()
    return lambda: segment.segment(data, kind, here, settings, time.perf_counter())


def most(one: Callable[[], object], callers: int, seconds: float) -> float:
    """Calls a second that `callers` threads get done."""
    start = time.perf_counter()

    def caller() -> int:
        count = 0
        while time.perf_counter() - start < seconds:
            one()
            count += 1
        return count

    with ThreadPoolExecutor(callers) as pool:
        counts = [future.result() for future in [pool.submit(caller) for _ in range(callers)]]
    return sum(counts) / (time.perf_counter() - start)


def options(description: str | None, **defaults: float) -> argparse.Namespace:
    """The command line of a load ratio: --bundle, --out, and one number for each default."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--bundle", type=Path, help="a bundle folder; without it a toy graph shows the overhead alone")
    parser.add_argument("--out", type=Path)
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    return parser.parse_args()
