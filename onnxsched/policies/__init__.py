"""Policies: pure functions from a graph, its costs and a machine to a schedule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from onnxsched.cost import CostModel
from onnxsched.graph import OperatorGraph
from onnxsched.machine import Machine
from onnxsched.policies.heft import heft
from onnxsched.policies.hios_lp import hios_lp
from onnxsched.policies.hios_mr import hios_mr
from onnxsched.policies.ios import ios
from onnxsched.policies.nimble import nimble
from onnxsched.policies.opara import opara
from onnxsched.policies.search import search
from onnxsched.policies.sequential import sequential
from onnxsched.policies.wavefront import wavefront
from onnxsched.schedule import Schedule
from onnxsched.seeding import band_schedule

__all__ = ["POLICIES", "SPREADING", "STARTS", "Policy"]

Policy = Callable[[OperatorGraph, CostModel, Machine], Schedule]

STARTS = (heft, hios_lp, band_schedule)
"""What `search` starts from."""

POLICIES: Mapping[str, Policy] = {
    "sequential": sequential,
    "wavefront": wavefront,
    "opara": opara,
    "nimble": nimble,
    "heft": heft,
    "hios-lp": hios_lp,
    "hios-mr": hios_mr,
    "ios": ios,
    "search": partial(search, starts=STARTS),
}

SPREADING = ("heft", "hios-lp", "hios-mr", "search")
"""Those that use more than the first device."""
