"""Stage pull: a source -> data/pulled/base.tar and source.json (what it means).

Images go in as they came, byte for byte, and so do masks of class ids; other label formats are rendered to masks here.
What cannot be used is named in source.json (`refused`); ingest puts it on the quarantine list.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from pipeline import config, paths
from pipeline import console as progress
from pipeline.demo import recipe as demo
from pipeline.demo import vizdoom
from pipeline.formats import cityscapes, coco, cvat, folder, geotiff, labelme, labelstudio, looks_like, voc
from pipeline.formats.common import class_list, unpack
from pipeline.formats.common.source import LISTS, Maker, Source, SourceError
from pipeline.formats.names import skipped
from pipeline.imaging import decode
from pipeline.ingest import label_counts
from pipeline.stage import Result
from pipeline.storage import atomic, shards

Pulled = tuple[dict[str, Any], dict[Path, int], list[tuple[str, str]]]  # source.json, images per archive, rows to show
Reader = Callable[..., Source]  # read(root, data, *, max_pixels)
READERS: dict[str, Reader] = {
    "folder": folder.read,
    "voc": voc.read,
    "cityscapes": cityscapes.read,
    "coco": coco.read,
    "labelme": labelme.read,
    "geotiff": geotiff.read,
    "cvat": cvat.read,
    "labelstudio": labelstudio.read,
}


def group_name(level: str) -> str:
    """`map01` -> `freedoom2-map01`: a level is a group."""
    return f"freedoom{2 if level.startswith('map') else 1}-{level}"


def demo_source(recipe: demo.Recipe) -> dict[str, Any]:
    """source.json of the demo. A level that serves labelled and unlabelled gives its first frames to labelled."""
    lists: dict[str, list[str]] = {part: [] for part in LISTS}
    for part in LISTS:
        item: demo.Part = getattr(recipe, part)
        for level in item.levels:
            first = recipe.labelled.frames if part == "unlabelled" and level in recipe.labelled.levels else 0
            lists[part] += [f"{group_name(level)}/{n:03d}" for n in range(first, first + item.frames)]
    return {
        "source": "demo",
        "classes": [{"id": k, "name": c.name, "color": list(c.color)} for k, c in enumerate(recipe.classes)],
        "ignore": 255,
        "lists": lists,
        "groups": {key: key.partition("/")[0] for ids in lists.values() for key in ids},
    }


def demo_members(
    frames: Mapping[str, list[vizdoom.Frame]], levels: list[str], with_masks: bool
) -> Iterator[tuple[str, bytes]]:
    """Archive members of the levels' frames, images first, sorted by name."""
    names = sorted((group_name(level), level) for level in levels)
    for group, level in names:
        for n, frame in enumerate(frames[level]):
            yield f"images/{group}/{n:03d}.png", frame.image_png
    for group, level in names if with_masks else ():
        for n, frame in enumerate(frames[level]):
            yield f"masks/{group}/{n:03d}.png", frame.mask_png


def pull_demo(params: config.Params) -> Pulled:
    """Render the demo: base.tar, and one archive per later dump in data/offered/ that the user may register."""
    recipe = demo.load_recipe(Path(params.data.path))
    wanted = demo.counts(recipe)
    with progress.bar("render", sum(wanted.values())) as bar:
        frames = demo.render_all(recipe, params.scale.workers, lambda _, count: bar.advance(count))
    later = {level for part in recipe.dumps.values() for level in part.levels}
    written = {paths.BASE_ARCHIVE: [level for level in wanted if level not in later]}
    written |= {paths.OFFERED / f"{name}.tar": list(part.levels) for name, part in recipe.dumps.items()}
    for path, levels in written.items():
        shards.write_tar(path, demo_members(frames, levels, with_masks=path == paths.BASE_ARCHIVE))
    return demo_source(recipe), {path: sum(wanted[level] for level in levels) for path, levels in written.items()}, []


def pull_labels(params: config.Params) -> Pulled:
    """Pack what the format's reader finds into base.tar, rendering masks one at a time."""
    data, path, images = params.data, paths.BASE_ARCHIVE, 0
    if data.source not in READERS:
        raise ValueError(f"data.source: {data.source} has no reader here; choose {', '.join(READERS)}")
    with unpack.opened(Path(data.path), params.ingest, paths.DATA) as root:
        try:
            source = READERS[data.source](root, data, max_pixels=params.ingest.max_pixels)
        except SourceError as error:
            raise _explained(error, root, data) from error
        source, refused = _without_unreadable_names(source)
        counts = label_counts.LabelCounts(len(source.classes))
        with progress.bar("pack", len(source.files)) as bar, shards.replacing_tar(path) as add:
            for name, origin in source.files:
                bar.advance()
                is_mask = name.startswith("masks/")
                try:
                    content = _content(origin, whole=is_mask)
                except decode.Refused as error:
                    refused.append((name, error.code, str(error)))
                    continue
                add(name, content)
                if isinstance(content, bytes) and is_mask:
                    counts.add(name, content, params.ingest.max_pixels)
                images += not is_mask
            listed_in = source.class_list or class_list.named_in(root, data)
            try:
                _demand_enough(source, images, counts, refused, listed_in, params)
            except SourceError as error:
                raise _explained(error, root, data) from error
    about: dict[str, Any] = {"source": data.source, "classes": source.classes, "ignore": 255, "lists": source.lists}
    about |= {"groups": source.groups, "group_pattern": data.group}  # the pattern also serves later dumps
    if refused:
        about["refused"] = [list(item) for item in sorted(refused)]
    return about, {path: images}, told(source, counts, refused)


def _explained(error: SourceError, root: Path, data: config.Data) -> SourceError:
    """The error with the source under the user's own name, and with what it looks like where it is of another format."""
    said = str(error).replace(str(root), data.path)
    hint = looks_like.hint(root, data.source)
    return SourceError(f"{said}\n  {hint}" if hint else said)


def _content(origin: Path | Maker, *, whole: bool) -> bytes | Path:
    """What goes into the archive: a mask's bytes, read or rendered once; an image's file by reference. Raises Refused."""
    if not isinstance(origin, Path):
        return origin()
    return origin.read_bytes() if whole else origin


def _without_unreadable_names(source: Source) -> tuple[Source, list[tuple[str, str, str]]]:
    """The source without files whose names are no UTF-8, and what is refused with them: no table could name them."""
    readable = [(name, origin) for name, origin in source.files if _is_text(name)]
    refused = [
        (shown(name), "bad-name", "its name is no UTF-8 text; rename the file")
        for name, _ in source.files
        if not _is_text(name)
    ]
    refused += [(shown(name), code, shown(reason)) for name, code, reason in source.refused]
    groups = (
        None if source.groups is None else {key: group for key, group in source.groups.items() if _is_text(key + group)}
    )
    lists = {part: None if ids is None else [key for key in ids if _is_text(key)] for part, ids in source.lists.items()}
    return replace(source, files=readable, groups=groups, lists=lists), refused


def _is_text(name: str) -> bool:
    """Whether a name from the file system is UTF-8; other bytes stand in it as lone surrogates (PEP 383)."""
    return not any("\ud800" <= letter <= "\udfff" for letter in name)


def shown(name: str) -> str:
    """A name as it can be printed and stored: bytes that are no UTF-8 become U+FFFD."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _demand_enough(
    source: Source,
    images: int,
    counts: label_counts.LabelCounts,
    refused: Sequence[tuple[str, str, str]],
    listed_in: str | None,
    params: config.Params,
) -> None:
    """Stop here, where the cause is, when nothing can come of the source.

    Raises:
        SourceError: with what the reader decided and passed over, which is often why.
    """
    where = params.data.path
    reasons = [(name, reason) for name, _, reason in refused]
    try:
        label_counts.demand_images(images, [item for item in reasons if not item[0].startswith("masks/")], where)
        label_counts.demand_labels(counts, [*reasons, *counts.refused], where)
        label_counts.demand_classes(counts.absent(source.classes), listed_in, params.data.missing_classes, where)
    except SourceError as error:
        decided = [f"decided: {shown(note)}" for note in source.notes]
        passed_over = [f"{what}: {shown(line)}" for what, line in skipped.rows(source.skipped)]
        raise SourceError("\n  ".join([str(error), *decided, *passed_over])) from error


def told(
    source: Source, counts: label_counts.LabelCounts, refused: list[tuple[str, str, str]]
) -> list[tuple[str, str]]:
    """What the reader decided and what came of it, as rows of the table."""
    rendered = sum(not isinstance(origin, Path) and name.startswith("masks/") for name, origin in source.files)
    rows = [("decided", shown(line)) for line in source.notes]
    masks = counts.usable + len(counts.refused)
    rows.append(("masks", f"{masks}, {'rendered from labels' if rendered else 'as they came'}"))
    rows += counts.shares(source.classes)
    rows += [(what, str(count)) for what, count in sorted(source.tally.items())]
    rows += [(what, shown(line)) for what, line in skipped.rows(source.skipped)]
    for code, count in sorted(Counter(code for _, code, _ in refused).items()):
        first = next(f"{name}: {reason}" for name, found, reason in refused if found == code)
        rows.append((f"refused: {code}", f"{count}, the first: {first}"))
    return rows


def run(params: config.Params) -> Result:
    """The stage: the source that `data` names -> data/pulled/, and for the demo also data/offered/."""
    paths.OFFERED.mkdir(parents=True, exist_ok=True)
    pull = pull_demo if params.data.source == "demo" else pull_labels
    source, written, rows = pull(params)
    atomic.write_json(paths.SOURCE, source)

    listed = ", ".join(f"{len(ids)} {part}" for part, ids in source["lists"].items() if ids is not None)
    names = [c["name"] for c in source["classes"]]
    rows.append(("classes", f"{len(names)}: {', '.join(names[:12])}{', ...' * (len(names) > 12)}"))
    rows.append(("lists", listed or "none (split by group)"))
    rows += [(str(path), f"{n} images, {path.stat().st_size / 2**20:.1f} MiB") for path, n in written.items()]
    table = Table("what", "found", title=f"pull: {params.data.source}")
    for row in rows:
        table.add_row(*map(escape, row))
    return Result((table,))
