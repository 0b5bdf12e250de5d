"""A plain folder of images: `images/`, `masks/` for some of them, and optional text lists.

images/ANY/PATH.jpg     every image; its *name id* is the path under images/ without the extension
masks/ANY/PATH.png      that image's mask: class ids, or the classes' colours; or one binary mask for each class (see
                        `pipeline.formats.common.binary_masks`); images without one are unlabelled. Other names that can
                        mean only one image are taken and reported (`pipeline.formats.names.matching`)
classes.txt             line n (from 0) names class n, optionally followed by a colour: `road #804080` or
                        `road 128 64 128`; with `data.classes: null` the ids found in the masks are the classes.
                        Lines `ignore 0 0 0` at its end say which colours of a colour mask mean ignore
labelled.txt ...        the images of each part, one a line (params.yaml: data.lists)

Folders named train, val and test, below images/ or around images/ and masks/, are the splits where data.lists names none.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from pipeline import config
from pipeline.formats.common import binary_masks, mask_encoding, split_lists
from pipeline.formats.common import class_list as class_lists
from pipeline.formats.common.source import Maker, Source, SourceError, groups_by, name_id, walk_all
from pipeline.formats.names import image_files, layout, matching
from pipeline.formats.names.skipped import Skipped
from pipeline.imaging import decode, label_maps
from pipeline.imaging.mask_png import Colour

# What the folders of images and masks are called, the right name first.
IMAGES = ("images", "image", "imgs", "img")
MASKS = (
    "masks", "mask", "labels", "label", "annotations", "annotation", "segmentation", "segmentations", "gt", "gts",
    "ground_truth", "groundtruth", "ground truth", "targets", "target",
)  # fmt: skip
# A mask that no image answers to.
NO_IMAGE = "mask-without-image"


@dataclass
class Tree:
    """The files of a source. Names are below images/ and masks/; where those lie in a split's folder, below SPLIT/."""

    images: dict[str, Path] = field(default_factory=dict)
    masks: dict[str, Path] = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)


def read(root: Path, data: config.Data, *, max_pixels: int) -> Source:
    """Read a source folder's lists and names; image bytes are read later, one at a time.

    `max_pixels` is the budget for masks that are decoded here, to find out what they hold.

    Raises:
        SourceError: no images, a class file or list that is not there, a list names an unknown image or one twice, a
            group that does not match, masks of mixed or unclear encoding; names the file.
    """
    tree = find(root)
    if not tree.images:
        raise SourceError(
            f"{root}: no files under images/; data.path must name a folder that holds images/ and masks/"
            + "".join(f"; passed over: {name} ({kind})" for kind, name in tree.skipped[:3])
        )
    ids = {name_id(name) for name in tree.images}
    listed = class_lists.read(root, data)
    known, ignored = listed if listed is not None else (None, [])
    source = Source(
        files=[(f"images/{name}", path) for name, path in tree.images.items()],
        classes=known or [],
        lists=split_lists.read(root, data.lists, ids, {f"images/{key}": key for key in ids}),
        groups=groups_by(data.group, sorted(ids)) or layout.groups_or_singles(tree.images),
        skipped=tree.skipped,
    )

    how: str = data.masks
    if how == "auto" and _are_binary(tree.masks, ids, known):
        how = "binary"
    if how == "binary":
        source = _with_binary_masks(source, root, data, tree.masks, known, max_pixels)
    else:
        source = _with_whole_masks(source, root, data, tree, known, ignored, max_pixels)
    return source if split_lists.given(data.lists) else _with_folder_splits(source, tree)


def find(root: Path) -> Tree:
    """images/ and masks/ of the source, and where it has none those in folders named as splits (`train/images`).

    Raises:
        SourceError: masks/ is not there, and several other folders may hold the masks.
    """
    tree = Tree()
    folders = sorted(item for item in root.iterdir() if item.is_dir()) if root.is_dir() else []
    folders = [item for item in folders if not image_files.is_system_file(item.name)]
    splits = {f"{item.name}/": item for item in folders if layout.split_word(item.name)}
    if _room(root, IMAGES) is None:
        homes = splits
    else:
        homes = {"": root}
        rooms_ = {_room(root, names) for names in (IMAGES, MASKS)}
        tree.skipped += [("folder beside images/, not read", f"{item.name}/") for item in folders if item not in rooms_]
    for prefix, home in homes.items():
        rooms = [place.name if (place := _room(home, names)) else names[0] for names in (IMAGES, MASKS)]
        masks = image_files.images_among(walk_all(home / rooms[1]))
        own = {name_id(name) for name in masks.images}
        images = image_files.photographs_among(walk_all(home / rooms[0]), own)
        for room, files, found in zip(rooms, (tree.images, tree.masks), (images, masks), strict=True):
            files |= {f"{prefix}{name}": path for name, path in found.images.items()}
            tree.skipped += [(what, f"{prefix}{room}/{name}") for what, name in found.skipped]
    return tree


def _room(home: Path, names: Sequence[str]) -> Path | None:
    """The folder by the first of its names, else the only one by any of them, in any case; None where there is none."""
    if (home / names[0]).is_dir():
        return home / names[0]
    beside = sorted(home.iterdir()) if home.is_dir() else []
    found = [item for item in beside if item.name.casefold() in names and item.is_dir()]
    if len(found) > 1:
        listed = matching.listed([f"{item.name}/" for item in found])
        raise SourceError(f"{home}: {listed} could each be {names[0]}/; name the right one so")
    return found[0] if found else None


def _with_whole_masks(
    source: Source,
    root: Path,
    data: config.Data,
    tree: Tree,
    known: class_lists.Classes | None,
    ignored: list[Colour],
    max_pixels: int,
) -> Source:
    """The source with one mask an image, of class ids or colours."""
    twice = {name: f"masks/{reason}" for name, reason in _same_names(tree.masks).items()}
    one_class = known is None or len(known) <= 2
    united = binary_masks.numbered(tree.masks, {name_id(name) for name in tree.images}) if one_class else {}
    parts = {path for paths in united.values() for path in paths}
    single = {name: path for name, path in tree.masks.items() if name not in twice and path not in parts}
    matched = matching.match([*single, *united], tree.images)
    twins = _same_names(tree.images)
    unclear = {name for name, image in matched.images.items() if image in twins}
    firsts = single | {name: paths[0] for name, paths in united.items()}
    masks = {image: firsts[name] for name, image in matched.images.items() if name not in unclear}
    several = {matched.images[name]: paths for name, paths in united.items() if name in matched.images}
    how: str = data.masks
    colours = mask_encoding.colours_of(known, ignored, str(data.classes)) if known and _distinct(known) else {}
    if how == "auto":
        how = mask_encoding.decide(list(tree.masks.values()), len(known) if known else None, colours, max_pixels)
    notes = [f"masks: {how}" + " (found by looking)" * (data.masks == "auto")] if tree.masks else []
    notes += [f"masks matched to images by {rule}: {line}" for rule, line in matched.forgiven]

    makers: dict[str, Path | Maker] = dict(masks)
    if how == "colours":
        colours = _needed(root, data, known, ignored)
        if data.masks == "auto" and [tuple(c["color"]) for c in known or ()] == label_maps.palette(2):
            colours |= mask_encoding.BLACK_AND_WHITE
            notes.append(mask_encoding.BLACK_AND_WHITE_NOTE)
        makers = {
            name: partial(mask_encoding.render, path, colours, max_pixels, source.tally) for name, path in masks.items()
        }
    elif data.masks == "auto" and _are_0_and_255(masks, known, str(root / str(data.classes)), max_pixels):
        makers = {name: partial(mask_encoding.render_0_and_255, path, max_pixels) for name, path in masks.items()}
        notes.append(mask_encoding.BINARY_NOTE)
        known = known or class_lists.numbered(2)
    if several := {image: paths for image, paths in several.items() if image in masks}:
        makers |= {image: partial(binary_masks.render_united, paths, max_pixels) for image, paths in several.items()}
        image, paths = next(iter(several.items()))
        names = matching.listed([path.name for path in paths])
        notes.append(
            f"numbered masks united, as there is one class: of {len(several)} images, the first: {image} has {names}"
        )
    return replace(
        source,
        files=[*source.files, *(_member(name, maker) for name, maker in makers.items())],
        classes=known if known is not None else _infer_classes(masks, max_pixels),
        notes=notes,
        refused=[
            *((f"masks/{name}", "duplicate-name", reason) for name, reason in twice.items()),
            *((f"masks/{name}", NO_IMAGE, reason) for name, reason in matched.refused.items()),
            *((f"masks/{name}", "duplicate-name", twins[matched.images[name]]) for name in sorted(unclear)),
        ],
    )


def _are_0_and_255(
    masks: Mapping[str, Path], known: class_lists.Classes | None, class_file: str, max_pixels: int
) -> bool:
    """Whether they are masks of two classes. Raises SourceError where they are and the class file names one."""
    count = len(known) if known else None
    if (count or 2) > 2 or not mask_encoding.are_0_and_255(masks.values(), count, max_pixels):
        return False
    if known and len(known) == 1:
        raise SourceError(
            f"{class_file}: names one class, and the masks hold only 0 and 255: put a line for what is 0, such as "
            "`background`, before it; where 255 means ignore, set data.masks: ids"
        )
    return True


def _same_names(names: Iterable[str]) -> dict[str, str]:
    """Files that differ only in their extension -> why none of them counts."""
    found = defaultdict(list)
    for name in names:
        found[name_id(name)].append(name)
    return {
        name: f"{key} is there as {matching.listed(same)}; keep the right one"
        for key, same in found.items()
        if len(same) > 1
        for name in same
    }


def _member(image: str, maker: Path | Maker) -> tuple[str, Path | Maker]:
    """A mask's member under its image's name id; its own extension where it goes in as it came."""
    extension = maker.suffix if isinstance(maker, Path) else ".png"
    return f"masks/{name_id(image)}{extension}", maker


def _with_folder_splits(source: Source, tree: Tree) -> Source:
    """The source with the lists that folders named train, val and test state, where there are any but train."""
    parts = layout.parts(list(tree.images))
    if not parts.keys() & {"val", "test"}:
        return source
    masked = {name_id(name.partition("/")[2]) for name, _ in source.files if name.startswith("masks/")}
    lists, left_out, notes = split_lists.own(parts, masked)
    stated = ", ".join(f"{len(ids)} {part}" for part, ids in sorted(parts.items()))
    return replace(
        source,
        files=[(name, origin) for name, origin in source.files if name_id(name.partition("/")[2]) not in left_out],
        lists=lists,
        notes=[*source.notes, f"splits by their folders: {stated}", *notes],
    )


def _distinct(known: class_lists.Classes) -> bool:
    return len({tuple(c["color"]) for c in known}) == len(known)


def _needed(
    root: Path, data: config.Data, known: class_lists.Classes | None, ignored: list[Colour]
) -> dict[Colour, int]:
    if known is None:
        raise SourceError(
            f"{root}: the masks are in colours, and only a class file says what they mean: name one in data.classes, "
            "with lines such as `road 128 64 128`"
        )
    return mask_encoding.colours_of(known, ignored, str(root / str(data.classes)))


def _are_binary(mask_files: Mapping[str, Path], ids: set[str], known: class_lists.Classes | None) -> bool:
    """No mask has an image's own name, and most name an image and a class.

    What only says that a file is a mask (`x_mask.png`) is no class, unless the class file names it.
    """
    if not mask_files or any(name_id(name) in ids for name in mask_files):
        return False
    parts, left = binary_masks.group(mask_files, ids, [c["name"] for c in known] if known else None)
    named = {name for by in parts.values() for name in by}
    if known is None and all(matching.is_mask_word(name) for name in named):
        return False
    return len(left) < len(mask_files) / 2


def _with_binary_masks(
    source: Source,
    root: Path,
    data: config.Data,
    mask_files: Mapping[str, Path],
    known: class_lists.Classes | None,
    max_pixels: int,
) -> Source:
    """The source with one binary mask an image and class."""
    ids = {name_id(name.partition("/")[2]) for name, _ in source.files}
    parts, left = binary_masks.group(mask_files, ids, [c["name"] for c in known] if known else None)
    classes, number, notes = class_lists.named(root, data, sorted({name for by in parts.values() for name in by}))
    empty, tally = class_lists.empty_id(data, number), source.tally
    rendered: list[tuple[str, Path | Maker]] = [
        (
            f"masks/{key}.png",
            partial(binary_masks.render, {number[n]: path for n, path in by.items()}, empty, max_pixels, tally),
        )
        for key, by in sorted(parts.items())
    ]
    reason = "no image and class go by this name; expected masks/NAME/CLASS, masks/CLASS/NAME or masks/NAME_CLASS"
    return replace(
        source,
        files=[*source.files, *rendered],
        classes=classes,
        refused=[(f"masks/{name}", NO_IMAGE, reason) for name in left],
        notes=[
            "masks: binary, one file per class" + " (found by looking)" * (data.masks == "auto"),
            f"pixels in no class: {data.unannotated}",
            *notes,
        ],
    )


def _infer_classes(mask_files: Mapping[str, Path], max_pixels: int) -> class_lists.Classes:
    """class_0 ... up to the highest id in the masks."""
    highest = -1
    for path in mask_files.values():
        try:
            ids = label_maps.decode_mask(path.read_bytes(), max_pixels=max_pixels)
        except decode.Refused:
            continue  # ingest quarantines it with its reason
        if (known := ids[ids < 255]).size:
            highest = max(highest, int(known.max()))
    if highest < 0:
        raise SourceError("no class file and no readable mask: name a file with one class a line in data.classes")
    return class_lists.numbered(highest + 1)
