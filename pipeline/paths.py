"""Where everything of a project stands: each path is relative to the project's folder, where every command runs.

dvc.yaml names the same paths as inputs and outputs of its stages.
"""

from pathlib import Path

# What people write, or commands write for them; kept in git.
PARAMS = Path("params.yaml")
DUMP_REGISTRY = Path("dumps.yaml")
LABEL_REGISTRY = Path("labels.yaml")

# What comes in.
DATA = Path("data")
PULLED = DATA / "pulled"
BASE_ARCHIVE = PULLED / "base.tar"
SOURCE = PULLED / "source.json"
OFFERED = DATA / "offered"  # later dumps of the demo, for `marginalia add-dump`
DUMPS = DATA / "dumps"
LABELS = DATA / "labels"

# What is made of it.
INGESTED = DATA / "ingested"  # a folder for each dump
ROWS_NAME, QUARANTINE_NAME = "rows.parquet", "quarantine.json"  # in each of them
MANIFEST = DATA / "manifest.parquet"
QUARANTINE = DATA / "quarantine.json"
SPLIT = DATA / "split"
SPLIT_MANIFEST = SPLIT / "manifest.parquet"
SPLIT_SUMMARY = SPLIT / "summary.json"
POOL = DATA / "pool"
PREDICTIONS = POOL / "images.npz"
PRELABELS = POOL / "prelabels.tar"

# Models.
STUDENT = Path("models/student")
STUDENT_WEIGHTS = STUDENT / "student.safetensors"  # of the last step
BEST_WEIGHTS = STUDENT / "best.safetensors"  # of the best step on val
TRAINING = STUDENT / "train.json"
DRAFT = Path("models/exported")
BUNDLE = Path("bundle")
CHAMPIONS = Path("champions")
CHAMPION = CHAMPIONS / "champion.json"

# Reports.
REPORTS = Path("reports")
SCREEN = REPORTS / "screen.json"
SCREEN_PASS = REPORTS / "screen.pass"
TRAIN_REPORTS = REPORTS / "train"
TRAIN_SCORES = TRAIN_REPORTS / "train.json"
LIVE = TRAIN_REPORTS / "live"
HISTORY = TRAIN_REPORTS / "history.jsonl"
CURVES = TRAIN_REPORTS / "curves.png"
PSEUDO_LABELS = TRAIN_REPORTS / "pseudo_labels.png"
SCORES = REPORTS / "scores.json"
CONFUSIONS = REPORTS / "confusions.npz"
EVALUATION = REPORTS / "evaluate"
MODEL_CARD = REPORTS / "model_card.md"
EXPORT = REPORTS / "export.json"
PARITY = REPORTS / "parity.json"
GATE = REPORTS / "gate.json"
DRIFT = REPORTS / "drift.json"
SERVED = REPORTS / "served.json"
RANKING = REPORTS / "rank.csv"
LABEL_NEXT = REPORTS / "label_next"
SUSPECTS = REPORTS / "suspects"
SUSPECT_LABELS = REPORTS / "suspect_labels.csv"
DATA_REPORT = REPORTS / "data.html"
COMPARISON = REPORTS / "compare"
HEADROOM = REPORTS / "headroom"
ENGINES_REPORT = REPORTS / "engines.json"

# What only this machine needs; never in git.
LOCAL = Path(".marginalia")
HANDED_OUT = LOCAL / "handed_out.jsonl"
LABELS_LOCK = LOCAL / "labels.lock"
ENGINES = LOCAL / "engines"
UNFINISHED = LOCAL / "work"  # checkpoints of trainings that were stopped
