"""serving.telemetry.metrics: what its callers tell it comes out as series with labels from fixed sets."""

import re

import pytest
from prometheus_client.parser import text_string_to_metric_families

from serving.telemetry import metrics


def series() -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(metrics.exposition().decode())
        for sample in family.samples
    }


def test_batches_and_queue() -> None:
    before = series()
    for size in (1, 3, 4, 40):
        metrics.batched(size)
    metrics.queued(7)
    after = series()
    grown = {
        dict(labels)["le"]: after[name, labels] - before[name, labels]
        for name, labels in after
        if name == "marginalia_batch_size_bucket"
    }
    assert grown == {"1.0": 1, "2.0": 1, "4.0": 3, "8.0": 3, "16.0": 3, "+Inf": 4}
    assert after["marginalia_batch_size_sum", ()] - before["marginalia_batch_size_sum", ()] == 48
    assert after["marginalia_queue_length", ()] == 7


def test_causes_are_a_fixed_set() -> None:
    metrics.swapped("refused", "made up")
    metrics.rejected("made up")
    labels = {value for _, pairs in series() for _, value in pairs}
    assert "made up" not in labels
    assert {"failed", "other"} <= labels


@pytest.fixture
def nothing_held() -> None:
    metrics.models({})
    metrics.agreed(None, {})


@pytest.mark.usefixtures("nothing_held")
def test_a_model_that_is_gone_leaves_no_series() -> None:
    metrics.models({"current": ("a" * 16, "cpu", "fp32"), "shadow": ("b" * 16, "cpu", "int8")})
    metrics.agreed(0.75, {"sky": 0.5})
    found = series()
    one = (("bundle", "a" * 16), ("precision", "fp32"), ("provider", "cpu"), ("slot", "current"))
    assert found["marginalia_model_info", one] == 1
    assert found["marginalia_shadow_agreement", ()] == 0.75
    assert found["marginalia_shadow_class_agreement", (("class_name", "sky"),)] == 0.5
    metrics.models({"current": ("c" * 16, "cpu", "fp32")})
    metrics.agreed(None, {})
    text = metrics.exposition().decode()
    assert re.findall(r'bundle="(\w+)"', text) == ["c" * 16]
    assert not [line for line in text.splitlines() if line.startswith("marginalia_shadow_") and "agreement" in line]
    metrics.models({})
