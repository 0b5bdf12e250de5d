"""Settings of earlier versions, so that an old params.yaml is refused with each setting's name of today."""

from collections.abc import Iterator, Mapping
from typing import Any

# Of the section `train`.
RENAMED = {
    "threshold": "train.fixmatch.threshold",
    "streams": "train.unimatch.streams",
    "preset": "train.s4mc.preset",
    "alpha": "train.s4mc.alpha",
    "alpha_end": "train.s4mc.alpha_end",
    "corrmatch_start": "train.corrmatch.start",
    "corrmatch_momentum": "train.corrmatch.momentum",
    "corrmatch_neighbours": "train.corrmatch.neighbours",
    "combine": "train.s4mc_corrmatch (j1: refined_selection, j2: falling_quantile, j3: correlated_neighbours)",
    "bar": "train.threshold_rule",
    "ohem_sure": "train.ohem.probability",
    "ohem_pixels": "train.ohem.pixels",
    "lr": "train.optimizer.lr",
    "lr_encoder": "train.optimizer.lr_encoder",
    "weight_decay": "train.optimizer.weight_decay",
    "poly_power": "train.optimizer.poly_power",
    "lr_warmup": "train.optimizer.lr_warmup",
    "clip_norm": "train.optimizer.clip_norm",
    "collapse_steps": "train.collapse.steps",
    "collapse_share": "train.collapse.share",
}


def renamed(raw: Mapping[str, Any]) -> Iterator[str]:
    """One sentence for each setting in `raw` that has another name now."""
    train = raw.get("train")
    if not isinstance(train, Mapping):
        return
    for old, new in RENAMED.items():
        if old in train:
            yield f"train.{old} is now {new}"
    if isinstance(train.get("corrmatch"), str):
        yield "train.corrmatch is now train.corrmatch.variant (mended: corrected)"
