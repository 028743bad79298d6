"""Results as the benchmark suite writes them, made up: for formats only."""

from __future__ import annotations

from typing import Any

TIMES_US = {"ort": 300.0, "ort-graph": 200.0, "torch-eager": 500.0, "torch-compile": 160.0,
            "torch-compile-nhwc": 150.0, "auto": 100.0}  # fmt: skip


def result(model: str, batch: int, arm: str) -> dict[str, Any]:
    """A measured arm, as fast as `TIMES_US` says times the batch."""
    time_us = TIMES_US[arm] * batch
    ratio = TIMES_US["ort-graph"] / TIMES_US[arm]
    return {
        "model": model,
        "batch": batch,
        "image": None,
        "sequence": None,
        "arm": arm,
        "error": None,
        "memory_nbytes": None,
        "time": {"median_us": time_us},
        "reference": {"median_us": TIMES_US["ort-graph"] * batch},
        "ratio": {"value": ratio, "low": ratio - 0.01, "high": ratio + 0.01},
    }


def report() -> dict[str, Any]:
    """Two models, one of them at two batches, and an arm that failed."""
    tried = {"policy": "heft", "predicted_us": 90.0, "tried_us": 101.0, "measured_us": None}
    measured = {"policy": "opara", "predicted_us": 95.0, "tried_us": None, "measured_us": 100.0}
    left = {"policy": "nimble", "predicted_us": 99.0, "tried_us": None, "measured_us": None}
    results = [
        result(model, batch, arm)
        for model, batch in (("googlenet", 1), ("googlenet", 8), ("bert", 1))
        for arm in TIMES_US
    ]
    results[5]["alternatives"] = [tried, measured, left]
    sentence = "The step 'measure' was not finished in 300 s."
    results.append({**result("bert", 1, "ort"), "arm": "torch-max-autotune", "error": sentence})
    environment = {"device": "a GPU", "onnxruntime": "1", "torch": "2", "cuda": "13"}
    return {
        "schema_version": 1,
        "date": "2000-01-01",
        "environment": environment,
        "results": results,
    }
