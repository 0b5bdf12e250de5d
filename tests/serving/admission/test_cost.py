"""What a whole request takes, from its bytes to the answer, is what was counted by the header: by view and kind."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from export.bundle.bundle import Bundle
from pipeline.imaging.decode_cost import OVERHEAD
from serving.admission import cost
from serving.http.negotiate import VIEWS, one
from serving.http.query import Query
from serving.settings import Settings
from tests.support import tiny_onnx
from tests.support.image_files import save
from tests.support.serving.peak_memory import growths

SETTINGS = Settings(large_pixels=5_000_000)
RNG = np.random.default_rng(4)
# The model's part is played by noise of its size, which makes the longest answers; its own memory is not counted here.
WORK = """
import json, sys
from pathlib import Path
import numpy as np
from export.bundle import bundle as bundles
from export.runtime.runtime import restored
from serving.admission import cost
from serving.http import large_images, responses, segment
from serving.http.negotiate import one
from serving.http.query import Query
from serving.settings import Settings
from tests.support.serving.peak_memory import growth
bundle = bundles.open_bundle(Path(sys.argv[1]))
settings = Settings(large_pixels=5_000_000)
def run(image_HWC):
    noise = np.random.default_rng(1).integers(0, 256, image_HWC.shape[:2], dtype=np.uint8)
    return noise % 2, noise
def work(view, asked):
    query, kind = Query.model_validate(asked), one(view)
    def call(data):
        if cost.of(data, kind, query, bundle, settings).is_large:
            model = large_images.WindowModel(bundle, run)
            return large_images.segment(large_images.opened(data), kind, query, model, settings)
        prepared = segment.prepare(data, bundle, settings)
        found = restored(*run(prepared.fitted_HWC), prepared.plan)
        return segment.render(kind, query, prepared, found, bundle, dict.fromkeys(("queue", "decode", "run"), 0.0))
    return call
found = {}
for case in sys.argv[2:]:
    view, path, asked = json.loads(case)
    found[case] = growth(work(view, asked), Path(path))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return tiny_onnx.write(tmp_path_factory.mktemp("tiny") / "bundle", long_side=512)


def test_a_request_takes_no_more_than_it_was_counted_for(bundle: Bundle, tmp_path: Path) -> None:
    """Kinds decoded whole and in bands, every view, and answers of other sizes than the image's."""
    photo = Image.fromarray(RNG.integers(0, 256, (75, 75, 3), dtype=np.uint8)).resize((2100, 2100))
    large = photo.resize((2600, 2600))
    files = {
        "photo.jpg": save(photo, "JPEG"),
        "alpha.webp": save(Image.new("RGBA", (2100, 2100), (90, 120, 60, 200)), "WEBP", lossless=True),
        "large.png": save(large, compress_level=1),
        "large.jpg": save(large, "JPEG"),
        "large.tif": save(large, "TIFF", compression="tiff_lzw"),
        "large.webp": save(Image.new("RGBA", (2600, 2600), (90, 120, 60, 200)), "WEBP", lossless=True),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    full: dict[str, str] = {"resolution": "full"}
    asked: list[tuple[str, str, dict[str, str]]] = [
        *((view, "photo.jpg", {}) for view in VIEWS),
        *((view, "photo.jpg", {"size": "2200x2200"}) for view in VIEWS),
        *((view, "photo.jpg", full) for view in VIEWS if view != "geojson"),
        ("mask", "alpha.webp", {}),
        *(("mask", name, query) for name in files if name.startswith("large") for query in ({}, full)),
        ("json", "large.png", {}),
        ("confidence", "large.png", full),
    ]

    cases = {json.dumps([view, str(tmp_path / name), query]): (view, name, query) for view, name, query in asked}
    took = growths(WORK, [str(bundle.folder), *cases])

    counted = {
        case: cost.of(files[name], one(view), Query.model_validate(query), bundle, SETTINGS).size
        for case, (view, name, query) in cases.items()
    }
    over = {str(cases[case]): (took[case], counted[case]) for case in cases if took[case] > counted[case]}
    assert over == {}
    far = {
        str(cases[case]): (took[case], counted[case]) for case in cases if counted[case] > 2.5 * took[case] + OVERHEAD
    }
    assert far == {}
