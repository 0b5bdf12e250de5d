"""A bundle in Python: `load` opens it, `Model.predict` segments an image. No torch."""

import os
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from export.bundle.bundle import open_bundle
from export.runtime.runtime import Precision, Provider, Runtime
from marginalia.result import ImageClass, Result
from pipeline.imaging import decode, resize

if TYPE_CHECKING:
    from PIL.Image import Image

    AnyImage = str | os.PathLike[str] | bytes | NDArray[np.uint8] | Image

MAX_PIXELS = 178_956_970  # of an image, as `ingest.max_pixels` is shipped


class ImageError(ValueError):
    """An image that cannot be segmented. `code` is that of the service's errors; the message says what to do."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Model:
    """An opened bundle. It may be called from several threads.

    Attributes:
        id: of the bundle: 16 hex digits over its models, classes and input rules.
        classes: in the order of their ids.
        runs_on: runtime, device and precision, such as `onnxruntime cpu int8`.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._manifest = runtime.bundle.manifest
        self.id = self._manifest.id
        self.classes = tuple(ImageClass(item.id, item.name, item.color) for item in self._manifest.classes)
        self.runs_on = str(runtime.option)

    def predict(self, image: "AnyImage") -> Result:
        """Segment one image, exactly as the service does.

        Args:
            image: a path, encoded bytes (JPEG, PNG, WebP, BMP, TIFF), H x W x 3 uint8 in RGB or H x W grey, or a Pillow
                image. It is scaled down to the model's long side, as in training; the answer has the image's own size.
        Raises:
            ImageError: the bytes are no image that is read, or the array has another shape or type.
            OSError: the file cannot be read.
        """
        image_HWC = _pixels(image)
        plan = self._runtime.bundle.fit(*image_HWC.shape[:2])
        label_NHW, confidence_NHW = self._runtime.run(resize.apply(image_HWC, plan)[None])
        label_HW, confidence_HW = (resize.restore(answer[0], plan) for answer in (label_NHW, confidence_NHW))
        return Result(image_HWC, label_HW, confidence_HW, self._manifest)

    def close(self) -> None:
        """Let go of the network; the model cannot predict after this."""
        del self._runtime

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<marginalia.Model {self.id} of {len(self.classes)} classes on {self.runs_on}>"


def load(
    bundle: str | os.PathLike[str],
    *,
    provider: Provider = "auto",
    precision: Precision = "auto",
    threads: int | None = None,
) -> Model:
    """Open a bundle: the folder that `dvc repro` or `marginalia verify` names.

    Args:
        provider: cpu, cuda, openvino or tensorrt; auto takes the fastest that runs here and agreed with torch.
        precision: fp32, bf16, fp16 or int8; auto as above.
        threads: of one prediction; None: the physical cores.
    Raises:
        BundleError: no such folder, or a file of it is missing or changed.
        ProviderError: what was asked for by name does not run here.
    """
    return Model(Runtime(open_bundle(Path(bundle)), provider=provider, precision=precision, threads=threads))


def _pixels(image: "AnyImage") -> NDArray[np.uint8]:
    """uint8 H x W x 3 in RGB."""
    if isinstance(image, np.ndarray):
        return _checked(image)
    if not isinstance(image, bytes | str | os.PathLike):
        return _checked(np.asarray(image.convert("RGB")))

    data = image if isinstance(image, bytes) else Path(image).read_bytes()
    try:
        return decode.decode(data, max_pixels=MAX_PIXELS)
    except decode.Refused as error:
        name = "" if isinstance(image, bytes) else f"{os.fspath(image)}: "
        raise ImageError(error.code, f"{name}{error}") from error


def _checked(array: NDArray[np.uint8]) -> NDArray[np.uint8]:
    if array.dtype != np.uint8:
        raise ImageError("unsupported-depth", f"an array of {array.dtype}; give uint8 with values of 0 to 255")
    if array.ndim == 2:
        return np.repeat(array[..., None], 3, axis=2)
    if array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise ImageError("not-an-image", f"an array of shape {array.shape}; give H x W x 3 in RGB, or H x W in grey")
    return np.ascontiguousarray(array)
