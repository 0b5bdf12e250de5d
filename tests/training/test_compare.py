"""The comparison's table, from finished runs."""

import csv
import math

import pytest
from rich.console import Console

from training import compare, gains
from training.compare import Run

RUNS = [
    Run("supervised", 0, 50.0, math.nan, math.nan, 0.3),
    Run("supervised", 1, 52.0, math.nan, math.nan, 0.5),
    Run("ceiling", 0, 70.0, math.nan, math.nan, 0.3),
    Run("ceiling", 1, 72.0, math.nan, math.nan, 0.3),
    Run("s4mc", 0, 56.0, 0.8, 0.9, 0.6),
    Run("s4mc", 1, 56.0, 0.6, 0.7, 0.8),
]


def table(tmp_path, runs, methods):
    comparison = compare.hold_together(runs, methods)
    compare.write(runs, comparison, tmp_path)
    rows = csv.DictReader((tmp_path / "table.csv").read_text().splitlines())
    return {row["method"]: row for row in rows}, comparison


def test_the_table_has_gain_scatter_and_share_of_the_headroom(tmp_path):
    rows, comparison = table(tmp_path, RUNS, ["supervised", "ceiling", "s4mc", "fixmatch"])
    assert list(rows) == ["supervised", "ceiling", "s4mc"]  # no run of fixmatch
    scatter = math.sqrt((2 + 2 + 0) / 3)
    assert comparison.scatter == pytest.approx(scatter)
    s4mc = {key: float(value) for key, value in rows["s4mc"].items() if key != "method"}
    assert s4mc == pytest.approx(
        {
            "seeds": 2, "miou": 56, "scatter": 0, "gain": 5, "gain_to_scatter": 5 / scatter, "share": 0.25,
            "kept": 0.7, "precision": 0.8, "seconds_per_step": 0.7,
        }
    )  # fmt: skip
    assert (tmp_path / "compare.png").stat().st_size > 5_000
    assert len((tmp_path / "runs.csv").read_text().splitlines()) == 7


def test_gains_are_over_the_first_method_where_labels_alone_were_not_run(tmp_path):
    rows, comparison = table(tmp_path, RUNS, ["s4mc", "ceiling"])
    assert comparison.baseline == "s4mc"
    assert float(rows["ceiling"]["gain"]) == pytest.approx(15)


def test_the_shown_table_says_where_there_is_no_headroom(tmp_path, capsys):
    runs = [run for run in RUNS if run.method != "ceiling"] + [
        Run("ceiling", 0, 52.0, math.nan, math.nan, 0.3),
        Run("ceiling", 1, 52.0, math.nan, math.nan, 0.3),
    ]
    comparison = compare.hold_together(runs, ["supervised", "ceiling", "s4mc"])
    Console().print(compare.table(compare.summarise(runs, comparison), comparison, tmp_path))
    shown = capsys.readouterr().out
    assert "no headroom here" in " ".join(shown.split())
    assert all(method in shown for method in ("supervised", gains.CEILING, "s4mc"))  # not cut at 80 columns


def test_without_a_split_no_hidden_labels_are_known(tmp_path):
    assert compare.hidden_labels(tmp_path / "manifest.parquet") is False
