"""Cityscapes' layout: leftImg8bit/SPLIT/CITY/*_leftImg8bit.png with gtFine/SPLIT/CITY/*_gtFine_label(Train)Ids.png.

The name id is SPLIT/CITY/CITY_SEQUENCE_FRAME, the group is the city. `data.annotations: gtCoarse` takes the coarse labels.
Images of the split test come with dummy labels, so both are left out. train_extra is unlabelled.
"""

import re
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np

from pipeline import config
from pipeline.formats.common import class_list as class_lists
from pipeline.formats.common import split_lists
from pipeline.formats.common.source import Maker, Source, SourceError, groups_by, walk
from pipeline.imaging import decode, label_maps

# Published in cityscapesscripts/helpers/labels.py: (name, trainId, colour), the row's place is the id. License plate has
# the id -1, which an 8-bit file stores as 255.
_VOID = 255
LABELS: tuple[tuple[str, int, tuple[int, int, int]], ...] = (
    ("unlabeled", _VOID, (0, 0, 0)), ("ego vehicle", _VOID, (0, 0, 0)), ("rectification border", _VOID, (0, 0, 0)),
    ("out of roi", _VOID, (0, 0, 0)), ("static", _VOID, (0, 0, 0)), ("dynamic", _VOID, (111, 74, 0)),
    ("ground", _VOID, (81, 0, 81)), ("road", 0, (128, 64, 128)), ("sidewalk", 1, (244, 35, 232)),
    ("parking", _VOID, (250, 170, 160)), ("rail track", _VOID, (230, 150, 140)), ("building", 2, (70, 70, 70)),
    ("wall", 3, (102, 102, 156)), ("fence", 4, (190, 153, 153)), ("guard rail", _VOID, (180, 165, 180)),
    ("bridge", _VOID, (150, 100, 100)), ("tunnel", _VOID, (150, 120, 90)), ("pole", 5, (153, 153, 153)),
    ("polegroup", _VOID, (153, 153, 153)), ("traffic light", 6, (250, 170, 30)), ("traffic sign", 7, (220, 220, 0)),
    ("vegetation", 8, (107, 142, 35)), ("terrain", 9, (152, 251, 152)), ("sky", 10, (70, 130, 180)),
    ("person", 11, (220, 20, 60)), ("rider", 12, (255, 0, 0)), ("car", 13, (0, 0, 142)), ("truck", 14, (0, 0, 70)),
    ("bus", 15, (0, 60, 100)), ("caravan", _VOID, (0, 0, 90)), ("trailer", _VOID, (0, 0, 110)),
    ("train", 16, (0, 80, 100)), ("motorcycle", 17, (0, 0, 230)), ("bicycle", 18, (119, 11, 32)),
)  # fmt: skip
CLASSES: class_lists.Classes = [
    {"id": train_id, "name": name, "color": list(colour)} for name, train_id, colour in LABELS if train_id != _VOID
]
_IMAGE = re.compile(r"(?P<key>[^/]+/(?:(?P<city>.+)/)?[^/]+)_leftImg8bit\.[^./]+")
_KINDS = {"trainIds": "labelTrainIds", "labelIds": "labelIds"}


def read(root: Path, data: config.Data, *, max_pixels: int) -> Source:
    """Read a Cityscapes tree. Raises SourceError: no leftImg8bit, or no label of the kind that params.yaml names."""
    found = {m["key"]: (m["city"], name, path) for name, path in walk(root / "leftImg8bit").items()
             if (m := _IMAGE.fullmatch(name))}  # fmt: skip
    if not found:
        raise SourceError(f"{root}: no leftImg8bit/SPLIT/CITY/*_leftImg8bit.png; data.path must name a Cityscapes tree")
    folder = data.annotations or "gtFine"
    labels = walk(root / folder)
    kinds = [data.cityscapes_ids] if data.cityscapes_ids != "auto" else list(_KINDS)
    files: list[tuple[str, Path | Maker]] = []
    used: Counter[str] = Counter()
    for key in found:
        for kind in kinds:
            path = labels.get(f"{key}_{folder}_{_KINDS[kind]}.png")
            if path is not None and not key.startswith("test/"):
                maker = path if kind == "trainIds" else partial(train_ids, path, max_pixels)
                files.append((f"masks/{key}.png", maker))
                used[kind] += 1
                break
    if labels and not used:
        wanted = " or ".join(f"*_{folder}_{_KINDS[kind]}.png" for kind in kinds)
        raise SourceError(f"{root / folder}: no {wanted}; see data.cityscapes_ids, or make them with cityscapesscripts")
    masked = {name[len("masks/") : -len(".png")] for name, _ in files}
    parts = {part: [key for key in found if key.startswith(f"{part}/")] for part in ("val", "test")}
    listed, left_out, notes = split_lists.own(parts, masked)
    cities = {city or key for key, (city, _, _) in found.items()}
    by_city = {key: city or key if len(cities) > 1 else key for key, (city, _, _) in found.items()}
    groups = groups_by(data.group, list(found)) or by_city
    ids = found.keys() - left_out
    if split_lists.given(data.lists):
        listed = split_lists.read(root, data.lists, ids, {f"leftImg8bit/{key}_leftImg8bit": key for key in ids})
    return Source(
        files=[(f"images/{k}{p.suffix}", p) for k, (_, _, p) in found.items() if k in ids] + files,
        classes=_classes(root, data, only_train_ids=set(used) <= {"trainIds"}),
        lists=listed,
        groups={key: group for key, group in groups.items() if key in ids},
        notes=[*(f"{folder} {_KINDS[kind]}: {count} masks" for kind, count in used.items()), *notes],
    )


def train_ids(path: Path, max_pixels: int) -> bytes:
    """A labelIds file -> PNG of train ids; -1 (255 in the file) and every class that is not evaluated become 255.

    Raises:
        images.Refused: as `label_maps.decode_mask`; "mask-class-id" for a value beyond the published table.
    """
    ids_HW = label_maps.decode_mask(path.read_bytes(), max_pixels=max_pixels)
    values = np.flatnonzero(np.bincount(ids_HW.ravel()))
    if (alien := values[(values >= len(LABELS)) & (values != _VOID)]).size:
        raise decode.Refused(
            "mask-class-id", f"{path.name}: id {alien[0]} is none of Cityscapes' {len(LABELS)}; are these labelIds?"
        )
    table = np.full(256, _VOID, np.uint8)
    table[: len(LABELS)] = [train_id for _, train_id, _ in LABELS]
    return label_maps.encode_png(table[ids_HW])


def _classes(root: Path, data: config.Data, *, only_train_ids: bool) -> class_lists.Classes:
    """The 19 evaluated classes; a class file may say what train ids of one's own mean."""
    file = class_lists.read(root, data)
    if file is None:
        return CLASSES
    if not only_train_ids and [c["name"] for c in file[0]] != [c["name"] for c in CLASSES]:
        raise SourceError(
            f"{root / str(data.classes)}: labelIds are mapped to the 19 published classes; set data.cityscapes_ids: "
            "trainIds for ids of your own, or take the file away"
        )
    return file[0]
