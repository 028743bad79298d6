"""The study of bands computes costs as it says, and its page holds its numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from onnxsched.bands import banded
from onnxsched.regions import find_bands
from sample_models import build
from support.optimizing import loaded
from tools.band_study import (
    ROOT,
    SETTINGS,
    Setting,
    best_us,
    gain_by_copies,
    roofline_cost,
    studied,
    table,
)

RESULTS = json.loads((ROOT / "docs" / "benchmarks" / "band-study.json").read_text())["results"]


def test_a_band_costs_its_share_of_the_whole_image(tmp_path: Path) -> None:
    model = loaded(build("inception_v3", image=1024), tmp_path)
    region = find_bands(model, 2)["bands-prefix"]
    result = banded(model, region.groups, 2)
    us = {
        node.name: cost.duration_us
        for form in (model, result)
        for node, cost in zip(form.proto.graph.node, roofline_cost(form).operators, strict=True)
    }
    whole_us = sum(us[name] for group in region.groups for name in group)
    bands_us = sum(us[f"{name}/band{k}"] for g in region.groups for name in g for k in (0, 1))
    assert bands_us == pytest.approx(whole_us * (1 + region.overhead), rel=0.05)


def test_a_setting_is_studied_whole_and_in_bands() -> None:
    found = studied(Setting("googlenet", 96))
    assert set(found["schemes"]) <= {"bands", "bands-half", "bands-prefix"}
    assert found["schemes"]["bands"]["operators"] > 0
    for entry in (found["whole_us"], *(scheme["us"] for scheme in found["schemes"].values())):
        others = [us for name, us in entry.items() if name not in ("copies", "twice")]
        assert entry.get("copies", 0) or entry.get("twice", others[0]) in others
        assert best_us(entry) <= min(others)
    assert "| googlenet 96 | 2 | NVLink |" in table([found])


def test_large_images_gain_from_bands_and_small_ones_do_not() -> None:
    assert [(r["model"], r["image"], r["device_count"], r["link"]) for r in RESULTS] == [
        (s.model, s.image, s.device_count, s.link) for s in SETTINGS
    ]
    of = {
        (r["image"], r["device_count"]): r
        for r in RESULTS
        if (r["model"], r["link"]) == ("inception_v3", "NVLink")
    }
    gain = {
        key: best_us(r["whole_us"]) / best_us(r["schemes"]["bands"]["us"]) for key, r in of.items()
    }
    assert gain[299, 2] < 1 < 1.4 < gain[2048, 2] < gain[2048, 4]
    one_us = best_us(of[2048, 2]["one_device_us"])
    assert one_us == pytest.approx(7930, rel=0.05)  # as measured on an H200
    assert one_us / best_us(of[2048, 2]["schemes"]["bands"]["us"]) > 1.6


def test_computing_twice_brings_little_but_for_nasnet() -> None:
    gains = {
        (r["model"], r["link"], scheme): gain_by_copies(us)
        for r in RESULTS
        for scheme, us in (
            ("whole", r["whole_us"]),
            *((scheme, entry["us"]) for scheme, entry in r["schemes"].items()),
        )
    }
    assert max(gain for (model, *_), gain in gains.items() if model != "nasnet_large") < 0.036
    assert gains["nasnet_large", "NVLink", "whole"] > 0.05
    assert all(gain == 0 for (_, link, _), gain in gains.items() if link == "host")


def test_the_page_holds_the_table_of_the_committed_results() -> None:
    assert table(RESULTS) in (ROOT / "docs" / "several-devices.md").read_text()
