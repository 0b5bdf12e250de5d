"""The student over labelled and unlabelled images: what it is unsure about and where each image lies in feature space.

Writes data/pool/images.npz (the arrays `pipeline.storage.predictions` describes) and data/pool/prelabels.tar: for the
shortlist of images worth labelling, the student's label map as an index PNG named by image id. `pipeline.drift.stage` and
`pipeline.labels.ranking` read them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table
from torch import Tensor, nn

from pipeline import config, paths
from pipeline import console as progress
from pipeline.imaging import label_maps, resize
from pipeline.labels import ranking
from pipeline.stage import Result
from pipeline.storage import atomic, manifest, predictions, shards
from training import inference
from training.methods.s4mc import margin, refine
from training.models import segmenter

POOL_SPLITS = ("labelled", "unlabelled")
SEED = 0


class PredictError(ValueError):
    """There is nothing to predict on; the message says what to do."""


@dataclass(frozen=True)
class Statistics:
    """Per image of a batch; see `pipeline.storage.predictions` for the meaning of each."""

    embedding: Tensor
    confidence: Tensor
    margin: Tensor
    entropy: Tensor
    area: Tensor
    doubt: Tensor
    margins: Tensor


def with_features(model: nn.Module, image_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """(logits_BKHW, deepest features_BDhw) from one forward pass: the encoder inside `model.net` is listened to."""
    heard: list[Tensor] = []
    net: Any = model.net
    handle = net.encoder.register_forward_hook(lambda _module, _inputs, output: heard.append(output[-1]))
    try:
        logits_BKHW = model(image_BCHW)
    finally:
        handle.remove()
    return logits_BKHW, heard[-1]


def statistics(logits_KHW: Tensor, features_DHW: Tensor, plan: resize.Fit) -> Statistics:
    """Numbers of one image, over its own pixels only (the padding is cut away; at least one feature cell stays).

    Entropy is divided by log K. Area is the share of pixels predicted as each class, doubt the sum of 1 - refined
    margin over these pixels divided by all pixels, so doubt / area is the mean doubt inside a class.
    """
    k = logits_KHW.shape[0]
    probability = torch.softmax(logits_KHW.float(), dim=0)[None]
    # Refinement looks at neighbours, padding included, as training does; only then the padding goes.
    sure = margin(refine(probability))[0, : plan.scaled_height, : plan.scaled_width]
    inside = probability[0, :, : plan.scaled_height, : plan.scaled_width]
    highest, label = inside.max(dim=0)
    entropy = -(inside * inside.clamp_min(1e-12).log()).sum(0) / np.log(max(2, k))
    flat, pixels = label.flatten(), label.numel()
    doubt = torch.zeros(k, dtype=torch.float64, device=flat.device)
    doubt.scatter_add_(0, flat, 1 - sure.flatten().double())
    bin_ = (sure.flatten() * predictions.MARGIN_BINS).long().clamp(0, predictions.MARGIN_BINS - 1)
    rows, columns = (
        -(-used * features_DHW.shape[axis] // padded)
        for axis, used, padded in (
            (1, plan.scaled_height, plan.padded_height),
            (2, plan.scaled_width, plan.padded_width),
        )
    )
    return Statistics(
        embedding=features_DHW[:, :rows, :columns].float().mean((1, 2)),
        confidence=highest.double().mean(),
        margin=sure.double().mean(),
        entropy=entropy.double().mean(),
        area=torch.bincount(flat, minlength=k).double() / pixels,
        doubt=doubt / pixels,
        margins=torch.bincount(bin_, minlength=predictions.MARGIN_BINS).double() / pixels,
    )


def choose_rows(rows: Sequence[manifest.Row], limit: int, seed: int = SEED) -> list[manifest.Row]:
    """Labelled and unlabelled rows; at most `limit` unlabelled ones, drawn at random but kept in the manifest's
    order.
    """
    wanted = [row for row in rows if row.split in POOL_SPLITS]
    unlabelled = [i for i, row in enumerate(wanted) if row.split == "unlabelled"]
    if len(unlabelled) > limit:
        drawn = np.random.default_rng(seed).choice(len(unlabelled), limit, replace=False)
        dropped = set(unlabelled) - {unlabelled[i] for i in drawn}
        wanted = [row for i, row in enumerate(wanted) if i not in dropped]
    return wanted


@torch.inference_mode()
def survey(
    model: nn.Module, batches: Sequence[list[manifest.Row]], policy: config.Input, max_pixels: int
) -> dict[str, NDArray[Any]]:
    """All arrays of the pool except `classes`, one row an image in batch order."""
    where = next(model.parameters()).device
    rows: list[manifest.Row] = []
    found: list[Statistics] = []
    with progress.bar("predict", sum(map(len, batches))) as bar:
        for samples in inference.stream(batches, policy, max_pixels, mask=False):
            logits_BKHW, features_BDHW = with_features(model, inference.to_network(samples, where))
            for sample, logits_KHW, features_DHW in zip(samples, logits_BKHW, features_BDHW, strict=True):
                rows.append(sample.row)
                found.append(statistics(logits_KHW, features_DHW, sample.fit))
            bar.advance(len(samples))
    columns: dict[str, NDArray[Any]] = {
        key: np.array([getattr(row, key) or "" for row in rows]) for key in ("id", "name", "dump", "group", "split")
    }
    for key in Statistics.__dataclass_fields__:
        columns[key] = torch.stack([getattr(s, key) for s in found]).cpu().numpy().astype(np.float32)
    return columns


@torch.inference_mode()
def write_prelabels(
    path: Path,
    model: nn.Module,
    rows: Sequence[manifest.Row],
    policy: config.Input,
    params: config.Params,
    palette: Sequence[Any],
) -> None:
    """A tar of ID.png label maps at original size, by batch."""
    where = next(model.parameters()).device
    batches = inference.plan_batches(rows, policy, params.evaluate.batch)
    with shards.replacing_tar(path) as add, progress.bar("pre-label", len(rows)) as bar:
        for samples in inference.stream(batches, policy, params.ingest.max_pixels, mask=False):
            labels, _ = inference.segment(model, samples, where)
            for sample, label in zip(samples, labels, strict=True):
                add(f"{sample.row.id}.png", label_maps.encode_png(resize.restore(label, sample.fit), list(palette)))
            bar.advance(len(samples))


def run(params: config.Params) -> Result:
    """The stage: student and data/split -> data/pool/. Raises PredictError when there is no image."""
    model, meta = segmenter.load(paths.STUDENT_WEIGHTS, inference.device())
    summary = atomic.read_json(paths.SPLIT_SUMMARY)
    policy = config.Input.model_validate(meta["params"]["input"])
    rows = choose_rows(manifest.read(paths.SPLIT_MANIFEST), params.pool.max_images)
    if not rows:
        raise PredictError(
            f"neither labelled nor unlabelled images are in {paths.SPLIT}; check the source and its lists"
        )
    columns = survey(
        model, inference.plan_batches(rows, policy, params.evaluate.batch), policy, params.ingest.max_pixels
    )
    columns["classes"] = np.array([c["name"] for c in meta["classes"]])
    with atomic.replacing(predictions.FILE) as file:
        np.savez_compressed(file, allow_pickle=False, **columns)
    seen = predictions.read_pool()
    frequency = ranking.label_frequency(summary, list(map(str, seen.classes)))
    listed = ranking.shortlist(seen, frequency, params.pool.label_next)
    by_id = {row.id: row for row in rows}
    palette = [tuple(c["color"]) for c in meta["classes"]]
    write_prelabels(predictions.PRELABELS, model, [by_id[str(seen.id[i])] for i in listed], policy, params, palette)
    table = Table("dump", "split", "images", "confidence", "refined margin", "entropy", title="predict: the pool")
    for dump in dict.fromkeys(map(str, seen.dump)):
        for split in POOL_SPLITS:
            here = (seen.dump == dump) & (seen.split == split)
            if here.any():
                means = (f"{getattr(seen, key)[here].mean():.3f}" for key in ("confidence", "margin", "entropy"))
                table.add_row(dump, split, str(int(here.sum())), *means)
    return Result((table,))
