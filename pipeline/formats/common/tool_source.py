"""A label tool's pictures and a folder of images -> a source."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from pipeline import config
from pipeline.formats.common import annotations, split_lists
from pipeline.formats.common import class_list as class_lists
from pipeline.formats.common.annotations import Picture
from pipeline.formats.common.source import Maker, Source, SourceError, groups_by, name_id, walk_all
from pipeline.formats.names import image_files, layout, matching
from pipeline.formats.names.skipped import Skipped
from pipeline.imaging import label_maps
from pipeline.imaging.decode import Refused
from pipeline.imaging.mask_png import Colour

NO_IMAGE, TWICE = "labels-without-image", "labels-twice"


@dataclass
class Labelled:
    """Which picture labels which image, and what became of the others."""

    pictures: dict[str, Picture] = field(default_factory=dict)  # image -> its picture
    refused: list[tuple[str, str, str]] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ToolExport:
    """What a label tool's export says.

    `labels`: the tool's own; one that stands for ignored pixels becomes 255. `colours`: of some labels. A picture's `subset`
    states its split where it is a split's word; where none is, the images' folders do.
    """

    pictures: Sequence[Picture]
    labels: Sequence[str]
    colours: Mapping[str, Colour] = field(default_factory=dict)


@dataclass(frozen=True)
class Painting:
    """How shapes become a mask: label -> class id, the id of what no shape covers, and the budget of pixels."""

    ids: Mapping[str, int]
    empty: int
    max_pixels: int


def export_source(root: Path, data: config.Data, export: ToolExport, max_pixels: int) -> Source:
    """Images lie in `root`/images; which of them a picture means is found by `pipeline.formats.names.matching`.

    Raises:
        SourceError: no image, or what class and id lists raise.
    """
    named = {name_id(picture.name) for picture in export.pictures}
    images = image_files.photographs_among(walk_all(root / "images"), named)
    if not images.images:
        raise SourceError(f"{root}: no files under images/; export the task with its images, or put them there")

    given = class_lists.read(root, data)
    ignored = annotations.ignore_label(export.labels, [c["name"] for c in given[0]] if given else ())
    names = [name for name in export.labels if name != ignored]
    classes, ids, notes = class_lists.named(root, data, names, export.colours)
    ids = ids | ({ignored: label_maps.IGNORE} if ignored else {})
    painting = Painting(ids, class_lists.empty_id(data, ids), max_pixels)

    labelled = _labelled(export.pictures, list(images.images))
    makers = _makers(labelled, images.images, data, painting)
    keys = [name_id(name) for name in images.images]
    masked = {name_id(name) for name in makers}
    stated = _stated(labelled) or layout.parts(list(images.images))
    splits = split_lists.decide(root, data.lists, set(keys), {f"images/{key}": key for key in keys}, stated, masked)
    return Source(
        files=[
            *((f"images/{name}", path) for name, path in images.images.items() if name_id(name) not in splits.left_out),
            *((f"masks/{name_id(name)}.png", maker) for name, maker in makers.items()),
        ],
        classes=classes,
        lists=splits.lists,
        groups=groups_by(data.group, keys) or layout.groups_or_singles(images.images),
        refused=labelled.refused,
        notes=[*notes, *labelled.notes, *splits.notes],
        skipped=[*((kind, f"images/{name}") for kind, name in images.skipped), *labelled.skipped],
    )


def _labelled(found: Sequence[Picture], images: Sequence[str]) -> Labelled:
    """Pair pictures with images. Of several pictures of one name the first counts."""
    index = matching.Index(images)
    named = [picture._replace(name=_own_name(picture, index)) for picture in found]
    matched = matching.match([picture.name for picture in named], images)
    out = Labelled()
    for picture in named:
        image = matched.images.get(picture.name)
        if image is None:
            meant = index.find(picture.name)
            better = meant.rule != matching.LAST and meant.image in matched.images.values()
            out.refused.append((picture.name, TWICE if better else NO_IMAGE, matched.refused[picture.name]))
        elif image in out.pictures:
            reason = f"images/{image} has labels already; export one task of it"
            out.refused.append((picture.name, TWICE, reason))
        else:
            out.pictures[image] = picture
    out.notes = [f"images matched to the labels' names by {rule}: {line}" for rule, line in matched.forgiven]
    return out


def _own_name(picture: Picture, index: matching.Index) -> str:
    """The one of a picture's possible names that an image answers to by the strictest rule; else its first.

    Tools put each subset's images in a folder of its name, and 000000.png may be in several.
    """
    in_subset = f"{picture.subset}/{picture.name}"
    if picture.subset and (found := index.find(in_subset)).image and found.rule != matching.LAST:
        return in_subset
    rules = {name: found.rule for name in (picture.name, *picture.names) if (found := index.find(name)).image}
    return min(rules, key=lambda name: matching.ORDER.index(rules[name]), default=picture.name)


def _makers(labelled: Labelled, images: Mapping[str, Path], data: config.Data, painting: Painting) -> dict[str, Maker]:
    """Image -> who renders its mask. Where what cannot be painted would become background, the mask is refused."""
    makers: dict[str, Maker] = {}
    for image, picture in labelled.pictures.items():
        labelled.skipped += [(kind, f"{which} of {picture.name}") for kind, which in picture.overruled]
        if picture.lost and data.unannotated == "background":
            reason = annotations.lost_reason(picture.lost[0])
            labelled.refused.append((f"masks/{name_id(image)}.png", annotations.NO_AREA, reason))
            continue
        labelled.skipped += [(kind, f"{which} of {picture.name}") for kind, which in picture.lost]
        if picture.shapes:
            makers[image] = partial(_render, picture, painting)
        elif data.no_shapes == "background" and picture.annotated and not picture.lost:
            makers[image] = partial(annotations.render_background, images[image], painting.empty, painting.max_pixels)
    empty = sum(picture.annotated and not picture.shapes and not picture.lost for picture in labelled.pictures.values())
    labelled.notes += annotations.no_shapes_notes(empty, data.unannotated, data.no_shapes)
    return makers


def _render(picture: Picture, painting: Painting) -> bytes:
    if not picture.height or not picture.width:
        raise Refused("bad-shape", "its labels state no image size; export it again")
    label_HW = annotations.paint(picture, painting.ids, max_pixels=painting.max_pixels, unannotated=painting.empty)
    return label_maps.encode_png(label_HW)


def _stated(labelled: Labelled) -> dict[str, list[str]]:
    """The tool's own splits, by name id of the images that its pictures mean."""
    parts: dict[str, list[str]] = {}
    for image, picture in labelled.pictures.items():
        if part := layout.split_word(picture.subset):
            parts.setdefault(part, []).append(name_id(image))
    return parts
