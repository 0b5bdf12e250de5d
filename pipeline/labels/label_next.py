"""Stage rank: the images that `pipeline.labels.ranking` chooses, packed for whoever labels them, with pre-labels.

reports/label_next/ is at once a folder source (images/, masks/, classes.txt), a CVAT import (cvat.zip) and a Label Studio
project (labelstudio.json, labelstudio.xml). names.json maps its name ids to image ids; in cvat.zip the id is in front of
each file's name, in labelstudio.json in each task's data: so every image is known again, whatever folder it lands in.
"""

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from pipeline import config, paths
from pipeline.formats import cvat, labelstudio
from pipeline.formats.common.source import name_id
from pipeline.formats.common.task import Item, task_name
from pipeline.imaging import label_maps
from pipeline.labels import exporter, ranking
from pipeline.labels.ranking import Choice
from pipeline.stage import Result
from pipeline.storage import atomic, manifest, predictions
from pipeline.storage.predictions import PoolError, PredictionPool

HOWTO = """\
Correct the pre-labels in the tool you like, then, in the project: marginalia import-labels WHAT-CAME-BACK; dvc repro

CVAT      New project; in its labels' "Raw" tab paste cvat_labels.json. Project > Actions > Import dataset,
          format "CVAT for images 1.1", file cvat.zip. Back: task > Actions > Export task dataset, the same format.
Label     New project; Labeling setup > Code: paste labelstudio.xml. Start Label Studio with
Studio    LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED=true and LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT=the folder above this
          one; add this folder as local storage, without syncing it. Import labelstudio.json. Back: Export > JSON.
Any other masks/ holds class ids (line n of classes.txt, from 0; 255 = ignore). Correct them in a copy of this folder.

Only what differs from its pre-label is taken back (Label Studio: what was submitted); --accept-unchanged takes the rest.
"""


def export_names(names: Sequence[str], dumps: Sequence[str]) -> list[str]:
    """File names without extension inside label_next; a name that occurs twice gets its dump as a folder."""
    often = Counter(names)
    return [name if often[name] == 1 else f"{dump}/{name}" for name, dump in zip(names, dumps, strict=True)]


def write_folder(
    folder: Path,
    choices: Sequence[Choice],
    pool: PredictionPool,
    rows: Mapping[str, manifest.Row],
    classes: Sequence[dict[str, Any]],
    max_pixels: int,
) -> None:
    """Replace the folder as a whole.

    Raises:
        PoolError: a chosen image has no pre-label or no row, because predict and rank saw different data.
    """
    chosen = [c.index for c in choices]
    made = exporter.prelabels()
    for i in chosen:
        if str(pool.id[i]) not in made or str(pool.id[i]) not in rows:
            raise PoolError(
                f"image {pool.name[i]} has no pre-label in {predictions.PRELABELS}; run the predict stage again"
            )
    mine = [rows[str(pool.id[i])] for i in chosen]
    names = export_names([row.name for row in mine], [row.dump for row in mine])
    colours = [tuple(c["color"]) for c in classes]
    handed: dict[str, str] = {}
    with atomic.replacing_folder(folder) as fresh:

        def items() -> Iterator[Item]:
            for name, item in zip(names, exporter.items(mine, made, max_pixels, handed=handed), strict=True):
                yield item._replace(name=f"{name}.{item.name.rpartition('.')[2]}")

        def stored() -> Iterator[Item]:
            for item in items():
                atomic.write_bytes(fresh / "images" / item.name, item.image)
                assert item.label_HW is not None
                png = label_maps.encode_png(item.label_HW, colours)
                atomic.write_bytes(fresh / "masks" / f"{name_id(item.name)}.png", png)
                yield item

        labelstudio.write(fresh / "labelstudio.json", stored(), classes, f"{folder.name}/images", "marginalia")
        atomic.write_text(fresh / "labelstudio.xml", labelstudio.config_xml(classes))
        cvat.write(fresh / "cvat.zip", (item._replace(name=task_name(item.id, item.name)) for item in items()), classes)
        atomic.write_text(fresh / "cvat_labels.json", json.dumps(cvat.labels_json(classes), indent=1) + "\n")
        atomic.write_text(fresh / "classes.txt", "".join(f"{name}\n" for name in pool.classes))
        atomic.write_json(fresh / "names.json", {name: row.id for name, row in zip(names, mine, strict=True)})
        atomic.write_text(fresh / "HOWTO.txt", HOWTO)
    exporter.hand_out(handed)


def table_csv(choices: Sequence[Choice], pool: PredictionPool) -> str:
    """rank.csv: place, id, name, dump, group, doubt, distance, mean refined margin and the most doubted class."""
    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    out.writerow(("place", "id", "name", "dump", "group", "doubt", "distance", "margin", "most_doubted"))
    for place, c in enumerate(choices, 1):
        i = c.index
        row = (pool.id[i], pool.name[i], pool.dump[i], pool.group[i], f"{c.doubt:.6f}", f"{c.distance:.4f}")
        out.writerow((place, *row, f"{pool.margin[i]:.6f}", pool.classes[int(np.argmax(pool.doubt[i]))]))
    return text.getvalue()


def run(params: config.Params) -> Result:
    """The stage: data/pool and data/split -> reports/rank.csv and reports/label_next/. Raises PoolError."""
    pool = predictions.read_pool()
    summary = atomic.read_json(paths.SPLIT_SUMMARY)
    frequency_K = ranking.label_frequency(summary, list(map(str, pool.classes)))
    choices = ranking.choose(pool, frequency_K, params.pool.label_next)
    rows = {row.id: row for row in manifest.read(paths.SPLIT_MANIFEST)}
    write_folder(paths.LABEL_NEXT, choices, pool, rows, summary["classes"], params.ingest.max_pixels)
    atomic.write_text(paths.RANKING, table_csv(choices, pool))

    table = Table("", "image", "group", "doubt", "most doubted class", title=f"label these next: {paths.LABEL_NEXT}")
    for place, c in enumerate(choices[:10], 1):
        doubted = str(pool.classes[int(np.argmax(pool.doubt[c.index]))])
        table.add_row(str(place), str(pool.name[c.index]), str(pool.group[c.index]), f"{c.doubt:.3f}", doubted)
    table.caption = f"{paths.LABEL_NEXT}/HOWTO.txt says how to correct them and bring them back"
    if len(choices) > 10:
        table.caption += f"; {len(choices) - 10} more in {paths.RANKING}"
    return Result((table,))
