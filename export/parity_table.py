"""The parity report as tables for people."""

from rich.table import Table

from pipeline.champions.parity_report import ParityReport, VariantReport


def tables(report: ParityReport) -> list[Table | str]:
    """fp32's agreement by class, one line for each variant, and a line for each that was left out."""
    left_out = {row.name: row.left_out for row in report.options if row.left_out}
    reasons = (left_out | report.not_judged).items()
    lines = [f"  left out: {name}: {reason}" for name, reason in reasons]
    return [_agreement(report), _variants(report), *lines]


def _agreement(report: ParityReport) -> Table:
    verdict = "passed" if report.passed else "FAILED"
    table = Table("agreement on", "working grid", "original")
    table.title = f"parity {verdict}: {report.provider} against torch"
    table.caption = (
        f"{report.images} test images; mIoU torch {_number(report.miou_torch, '.3f')}, "
        f"runtime {_number(report.miou_runtime, '.3f')}; "
        f"{report.differing_pixels} pixels differ, {report.near_ties_among_them} of them near-ties"
    )
    for name, share in report.grid.per_class.items():
        table.add_row(name, _number(share, ".6f"), _number(report.original.per_class[name], ".6f"))
    overall = (report.grid.agreement, report.original.agreement)
    table.add_row("all pixels", *(f"{share:.6f}" for share in overall), style="bold")
    return table


def _variants(report: ParityReport) -> Table:
    table = Table("option", "ms", "speed-up", "agreement", "lowest class", "borders", "mIoU drop", "bundle")
    table.title = f"variants of the network: one image of {report.timed_on} pixels, {report.threads} threads"
    for row in report.options:
        table.add_row(*_cells(row))
    if unseen := [name for name, points in report.class_drop.items() if points is None]:
        table.caption = f"no test image shows {', '.join(unseen)}: nothing here speaks of these classes"
    return table


def _cells(row: VariantReport) -> list[str]:
    lowest = min(share for share in row.grid.per_class.values() if share is not None)
    return [
        row.name,
        f"{row.ms:.1f}",
        f"{row.speedup:.2f}",
        f"{row.grid.agreement:.4f}",
        f"{lowest:.3f}",
        _number(row.border_agreement, ".4f"),
        _number(row.miou_drop, "+.2f"),
        "yes" if row.admitted else "no",
    ]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
