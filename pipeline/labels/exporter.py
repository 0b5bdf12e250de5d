"""The project's images, labels and pre-labels, written out for label tools and other programs.

An image that training sees with a label, or that is held out, has its own; any other has its pre-label where predict made
one (hidden labels of unlabelled images stay hidden). Files are named `task_name`: the image's id in front, so that
`import-labels` knows each one again for certain.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline import config, paths
from pipeline.formats import coco, cvat, labelstudio, voc
from pipeline.formats.common.task import Item, id_prefix, task_name
from pipeline.imaging import decode, label_maps
from pipeline.stage import Result
from pipeline.storage import atomic, manifest, shards

FORMATS = ("cvat", "labelstudio", "coco", "voc")
SUFFIX = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "TIFF": "tif"}
OWN = ("labelled", "val", "test")


def prelabels(root: Path = Path()) -> dict[str, shards.Member]:
    """Image id -> its pre-label in the pool; {} where predict has not run."""
    path = root / paths.PRELABELS
    return {member.name.removesuffix(".png"): member for member in shards.members(path)} if path.exists() else {}


def handed_out(root: Path = Path()) -> dict[str, set[str]]:
    """Image id -> digests of all pre-labels that ever left for it: a task may be out while other models make others.

    Raises:
        ValueError: a line is damaged; names the file.
    """
    found: dict[str, set[str]] = {}
    file = root / paths.HANDED_OUT
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines() if file.exists() else [], 1):
        try:
            for id_, digest in json.loads(line).items():
                found.setdefault(id_, set()).add(digest)
        except (ValueError, AttributeError, TypeError) as error:
            raise ValueError(f"{file}: line {number} is no hand-out ({error}); remove that line") from error
    return found


def hand_out(digests: Mapping[str, str], root: Path = Path()) -> None:
    """Remember which pre-labels left."""
    file = root / paths.HANDED_OUT
    if digests:
        known = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        line = json.dumps(digests, sort_keys=True)
        atomic.write_text(file, "".join(f"{text}\n" for text in [*(text for text in known if text != line), line]))


def items(
    rows: Iterable[manifest.Row],
    made: Mapping[str, shards.Member],
    max_pixels: int,
    root: Path = Path(),
    handed: dict[str, str] | None = None,
) -> Iterator[Item]:
    """One image in memory at a time. `handed` takes the digest of each pre-label by image id, for `hand_out`.

    Raises:
        manifest.ManifestError, ValueError: a damaged image, mask or pre-label; named.
    """
    handed = {} if handed is None else handed
    for row in rows:
        data = manifest.read_image_bytes(row, root)
        label_HW = manifest.open_mask(row, max_pixels, root) if row.split in OWN else None
        if label_HW is None and (member := made.get(row.id)):
            png = shards.read(root / paths.PRELABELS, member.offset, member.length)
            label_HW = label_maps.decode_mask(png, max_pixels=max_pixels).astype("uint8")
            handed[row.id] = manifest.mask_digest(label_HW)
        name = task_name(row.id, f"{row.name}.{SUFFIX[decode.sniff(data)]}")
        yield Item(name, row.id, data, row.height, row.width, label_HW)


def write(
    path: Path,
    form: str,
    found: Iterable[Item],
    classes: Sequence[dict[str, Any]],
    splits: Mapping[str, str] | None = None,
) -> int:
    """A zip for cvat, a folder for the others; returns how many images."""
    if form == "cvat":
        return cvat.write(path, found, classes)
    if form == "coco":
        return coco.write(path, found, classes)
    if form == "voc":
        return voc.write(path, found, classes, splits)
    with atomic.replacing_folder(path) as fresh:

        def stored() -> Iterator[Item]:
            for item in found:
                atomic.write_bytes(fresh / "images" / item.name, item.image)
                yield item._replace(image=b"")

        count = labelstudio.write(fresh / "tasks.json", stored(), classes, f"{path.resolve().name}/images")
        atomic.write_text(fresh / "config.xml", labelstudio.config_xml(classes))
    return count


def run(params: config.Params, form: str, output: Path, splits: Sequence[str]) -> Result:
    """`marginalia export-labels`: the images of `splits` in one of FORMATS.

    Raises:
        ValueError: there is no such image, or something else lies at `output`.
    """
    rows = [row for row in manifest.read(paths.SPLIT_MANIFEST) if row.split in splits]
    classes = atomic.read_json(paths.SOURCE)["classes"]
    if not rows:
        raise ValueError(f"no image in {', '.join(splits)}")
    if output.is_dir() and not _ours(output):
        raise ValueError(
            f"{output}: holds files that are no earlier export, and would be replaced whole; name a new folder"
        )
    if form != "cvat" and output.is_file():
        raise ValueError(f"{output}: is a file; {form} is written as a folder, name a new one")

    handed: dict[str, str] = {}
    found = items(rows, prelabels(), params.ingest.max_pixels, handed=handed)
    count = write(output, form, found, classes, {row.id: row.split for row in rows})
    hand_out(handed)
    record = {"output": str(output), "format": form, "images": count}
    return Result((f"{output}: {count} images for {form}",), record=record)


def _ours(folder: Path) -> bool:
    """Whether an earlier export, or nothing, lies there: a folder is replaced whole.

    A data set of somebody's own has the same folders; only in an export is each picture named by `task_name`.
    """
    there = {p.name for p in folder.iterdir()}
    pictures = [p.name for room in ("images", "JPEGImages") for p in (folder / room).glob("*")]
    return not there or (bool(pictures) and all(map(id_prefix, pictures)) and there <= {
        "images", "annotations", "tasks.json", "config.xml", "JPEGImages", "SegmentationClass", "ImageSets", "labelmap.txt",
    })  # fmt: skip
