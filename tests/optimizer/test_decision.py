"""The fastest is chosen, a policy that is asked for is obeyed, and the cache is not trusted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnxsched.candidates import Candidate
from onnxsched.contraction import Contraction
from onnxsched.cost import TableCost
from onnxsched.decision import Decision, decide, decision_key, recall, remember
from onnxsched.graph import OperatorGraph, Weight
from onnxsched.loading import Model, graph_from_model
from onnxsched.machine import Machine
from onnxsched.outcomes import Outcome, Subject
from onnxsched.profiling.cache import MeasurementCache
from onnxsched.proposals import Request
from onnxsched.recomputing import Duplicate
from onnxsched.schedule import Schedule, Slot
from onnxsched_runtime.device import Device, Placement
from onnxsched_runtime.kernels import FusedConvolution, Kernels, kernels_to_json
from onnxsched_runtime.variant import DEFAULT_VARIANT, Variant
from support.graphs import graph_of
from support.models import CPU, MODELS
from support.optimizing import as_it_is

DIAMOND = graph_of(4, [(0, 1), (0, 2), (1, 3), (2, 3)])
OPERATORS = {f"operator_{index}": (float(index + 1), "memory") for index in range(4)}

WHAT = FusedConvolution(
    1, (1, 3, 8, 8), (4, 3, 3, 3), (1, 4, 8, 8), (1, 1), (1, 1), (1, 1, 1, 1), True, False, True
)
KERNELS: Kernels = {WHAT: ((47,), (3, 2)), replace(WHAT, adds=True): ((1,),)}
KERNEL_FIELDS = kernels_to_json(KERNELS)[0][0]


def subject(variant: Variant = DEFAULT_VARIANT, rewrite: str = "none") -> Subject:
    proto = onnx.ModelProto()
    model = Model(proto, {}, {}, {}, proto, variant, rewrite=rewrite)
    return Subject(
        model,
        model,
        Contraction(DIAMOND, ()),
        TableCost(()),
        (),
        OPERATORS,
        {},
    )


SUBJECTS = [subject()]
MACHINE = Machine((CPU,), 2)


def outcome(policy: str, *samples_us: float, streams: tuple[int, ...] = (0, 0, 1, 0)) -> Outcome:
    slots = tuple(Slot(index, Placement(CPU, stream)) for index, stream in enumerate(streams))
    candidate = Candidate(policy, Schedule(slots), Schedule(slots), predicted_us=20.0)
    return Outcome(candidate, None, samples_us)


SEQUENTIAL = outcome("sequential", 10.0, 12.0, 14.0, streams=(0, 0, 0, 0))
FAST, SLOW = outcome("heft", 8.0, 9.0, 30.0), outcome("nimble", 20.0, streams=(0, 1, 0, 0))
UNMEASURED = outcome("opara", streams=(1, 1, 0, 0))


def test_auto_takes_the_fastest() -> None:
    decision = decide([FAST, SEQUENTIAL, SLOW, UNMEASURED], SUBJECTS, "auto")
    assert (decision.policy, decision.measured_us, decision.sequential_us) == ("heft", 9.0, 12.0)
    assert decision.schedule == FAST.candidate.schedule


def test_auto_takes_sequential_where_that_is_fastest() -> None:
    decision = decide([SEQUENTIAL, SLOW], SUBJECTS, "auto")
    assert (decision.policy, decision.measured_us, decision.sequential_us) == (
        "sequential", 12.0, 12.0,
    )  # fmt: skip


def test_a_policy_is_obeyed_even_where_it_is_slower() -> None:
    decision = decide([FAST, SEQUENTIAL, SLOW], SUBJECTS, "nimble")
    assert (decision.policy, decision.measured_us, decision.sequential_us) == (
        "nimble", 20.0, 12.0,
    )  # fmt: skip


def test_a_variant_brings_its_own_operators_and_the_default_is_what_it_is_compared_with() -> None:
    nhwc = Variant("nhwc")
    fast = replace(FAST, form=(nhwc, "none"))
    other = replace(subject(nhwc), operators={"operator_0": (0.5, "compute")})
    slow_in_nhwc = replace(outcome("sequential", 11.0), form=(nhwc, "none"))
    decision = decide([fast, slow_in_nhwc, SEQUENTIAL], [other, subject()], "auto")
    assert decision.variant == nhwc
    assert decision.operators == {"operator_0": (0.5, "compute")}
    assert decision.sequential_us == 12.0


def test_a_rewrite_is_a_form_of_its_own_and_the_model_as_loaded_the_measure() -> None:
    merged = (DEFAULT_VARIANT, "merge")
    fast = replace(FAST, form=merged)
    other = replace(subject(rewrite="merge"), operators={"operator_1": (0.5, "compute")})
    one_stream = replace(outcome("sequential", 11.0), form=merged)
    decision = decide([fast, one_stream, SEQUENTIAL], [subject(), other], "auto")
    assert (decision.rewrite, decision.variant) == ("merge", DEFAULT_VARIANT)
    assert decision.operators == {"operator_1": (0.5, "compute")}
    assert decision.sequential_us == 12.0
    assert [a["rewrite"] for a in decision.alternatives] == ["merge", "merge", "none"]


def test_a_policy_that_proposes_only_the_sequential_schedule_gets_that() -> None:
    assert decide([SEQUENTIAL], SUBJECTS, "wavefront").schedule == SEQUENTIAL.candidate.schedule


def test_everything_that_was_tried_is_kept() -> None:
    decision = decide([FAST, SEQUENTIAL, UNMEASURED], SUBJECTS, "auto")
    assert [(a["policy"], a["streams"], a["measured_us"]) for a in decision.alternatives] == [
        ("heft", 2, 9.0),
        ("sequential", 1, 12.0),
        ("opara", 2, None),
    ]
    assert decision.alternatives[0]["samples_us"] == [8.0, 9.0, 30.0]
    assert decision.operators["operator_2"] == (3.0, "memory")


@pytest.fixture
def cache(tmp_path: Path) -> MeasurementCache:
    return MeasurementCache(tmp_path, "this machine")


@pytest.fixture
def decision() -> Decision:
    return replace(decide([FAST, SEQUENTIAL], SUBJECTS, "auto"), refusals={"operator_1": "no"})


def test_a_decision_is_remembered(cache: MeasurementCache, decision: Decision) -> None:
    remember(cache, "key", decision, MACHINE.devices)
    assert recall(cache, "key", lambda *_: DIAMOND, MACHINE) == decision
    assert recall(cache, "another", lambda *_: DIAMOND, MACHINE) is None


def test_the_kernels_of_what_was_chosen_are_part_of_it(cache: MeasurementCache) -> None:
    fuses = Variant("nhwc", fuses=True)
    other = subject(fuses)
    other = replace(other, model=replace(other.model, kernels=KERNELS))
    kept = decide([replace(FAST, form=(fuses, "none")), SEQUENTIAL], [subject(), other], "auto")
    assert kept.kernels == KERNELS
    remember(cache, "key", kept, MACHINE.devices)
    assert recall(cache, "key", lambda *_: DIAMOND, MACHINE) == kept
    assert decide([SEQUENTIAL], [subject(), other], "auto").kernels == {}


ASKED = Request("auto", MACHINE, 5.0, True, ())
GROUPS = Machine((CPU, Device("cpu", 1)), 2)
GIVEN = {"x": np.array([1, 2]), "names": np.array(["ab", "cd"], object)}


def model_key(request: Request = ASKED, **changes: Any) -> str:
    model = replace(as_it_is(MODELS["fork_join"]()), given=GIVEN)
    return decision_key(replace(model, **changes), request)


def test_it_is_kept_for_all_that_is_asked() -> None:
    order = Schedule(tuple(Slot(index, Placement(CPU, index % 2)) for index in range(4)))
    asked = [
        ASKED,
        replace(ASKED, policy="heft"),
        replace(ASKED, machine=replace(MACHINE, stream_count=3)),
        replace(ASKED, budget_s=6.0),
        replace(ASKED, variants=False),
        replace(ASKED, machine=GROUPS),
        replace(ASKED, machine=GROUPS, split=False),
        replace(ASKED, machine=replace(GROUPS, devices=GROUPS.devices[::-1])),
        replace(ASKED, schedule=order),
        replace(ASKED, schedule=Schedule((*order.slots[:2], *order.slots[:1:-1]))),
    ]
    keys = [model_key(request) for request in asked]
    keys += [
        model_key(given={**GIVEN, name: array})
        for name, array in (
            ("x", np.array([2, 1])),
            ("names", np.array(["ab", "ce"], object)),
            ("y", np.array([1, 2])),
        )
    ]
    other = as_it_is(MODELS["diamond"]()).proto
    keys.append(model_key(proto=other))
    assert len(set(keys)) == len(keys)
    assert keys[: len(asked)] == [model_key(request) for request in asked]
    elsewhere = {**GIVEN, "names": np.array(["".join("ab"), "".join("cd")], object)}
    assert model_key(given=elsewhere) == model_key()


def test_one_device_is_as_good_as_another_of_its_kind() -> None:
    second = replace(MACHINE, devices=GROUPS.devices[1:])
    for split in (True, False):
        assert model_key(replace(ASKED, machine=second, split=split)) == model_key()


def test_memory_counts_where_it_limits_and_only_by_the_quarter() -> None:
    most = graph_from_model(as_it_is(MODELS["fork_join"]())).total_nbytes

    def key(*rooms_nbytes: int) -> str:
        rooms = dict(zip(GROUPS.devices, rooms_nbytes, strict=False))
        return model_key(replace(ASKED, machine=replace(GROUPS, memory_nbytes=rooms)))

    unlimited = model_key(replace(ASKED, machine=GROUPS))
    assert unlimited == key(most) == key(most + 1, 2 * most)
    assert key(most - 1) == key(most - 2) == key(most - 1, most) == key(most - 1, 2 * most)
    limited = [key(), key(most - 1), key(most // 2), key(0), key(most, 0), key(0, 0)]
    assert len(set(limited)) == len(limited)


def test_it_is_recalled_for_the_graph_that_its_rewrite_makes(
    cache: MeasurementCache, decision: Decision
) -> None:
    kept = replace(decision, rewrite="merge")
    remember(cache, "key", kept, MACHINE.devices)
    graphs = {"merge": DIAMOND, "none": graph_of(3, [])}

    def made(rewrite: str, _: object) -> OperatorGraph:
        return graphs[rewrite]

    assert recall(cache, "key", made, MACHINE) == kept
    remember(cache, "key", decision, MACHINE.devices)
    assert recall(cache, "key", made, MACHINE) is None
    remember(cache, "key", replace(decision, rewrite="melt"), MACHINE.devices)
    assert recall(cache, "key", made, MACHINE) is None


def test_what_is_computed_twice_is_part_of_it(cache: MeasurementCache, decision: Decision) -> None:
    duplicates = (Duplicate("a", "a/copy", ("b", "c")), Duplicate("d", "d/copy", ("a/copy",)))
    kept = replace(decision, rewrite="twice", duplicates=duplicates)
    remember(cache, "key", kept, MACHINE.devices)
    asked: list[object] = []

    def made(*form: object) -> OperatorGraph:
        asked.append(form)
        return DIAMOND

    assert recall(cache, "key", made, MACHINE) == kept
    assert asked == [("twice", duplicates)]
    other = replace(subject(rewrite="twice"), duplicates=duplicates)
    fast = replace(FAST, form=(DEFAULT_VARIANT, "twice"))
    assert decide([fast, SEQUENTIAL], [subject(), other], "auto").duplicates == duplicates
    assert decide([SEQUENTIAL, fast], [subject(), other], "auto").duplicates == ()


def test_it_is_recalled_for_the_device_that_is_asked_for(
    cache: MeasurementCache, decision: Decision
) -> None:
    remember(cache, "key", decision, MACHINE.devices)
    recalled = recall(cache, "key", lambda *_: DIAMOND, Machine((Device("cuda", 1),), 2))
    assert recalled is not None
    devices = {placement.device for placement in recalled.schedule.placement_of.values()}
    assert devices == {Device("cuda", 1)}


def test_devices_and_streams_are_kept_and_a_device_that_is_too_full_is_not_used(
    cache: MeasurementCache, decision: Decision
) -> None:
    one, other = Device("cuda", 3), Device("cuda", 1)
    places = [Placement(one, 0), Placement(other, 1), Placement(one, 1), Placement(one, 0)]
    schedule = Schedule(tuple(Slot(v, place) for v, place in enumerate(places)))
    spread = replace(decision, schedule=schedule, sequential_us=None)
    machine = Machine((one, other), 1)
    remember(cache, "key", spread, machine.devices)
    assert recall(cache, "key", lambda *_: DIAMOND, machine) == spread
    full = replace(machine, memory_nbytes={other: 1})
    weighty = replace(
        DIAMOND,
        operators=tuple(replace(o, weights=(Weight("w", 2),)) for o in DIAMOND.operators),
    )
    assert recall(cache, "key", lambda *_: weighty, machine) == spread
    assert recall(cache, "key", lambda *_: weighty, full) is None


def test_where_no_device_alone_has_room_there_is_nothing_to_compare_with() -> None:
    assert decide([FAST, SLOW], SUBJECTS, "auto").sequential_us is None


@pytest.mark.parametrize(
    "graph",
    [
        graph_of(0, []),
        graph_of(3, [(0, 1), (0, 2)]),
        graph_of(5, [(0, 1), (0, 2), (1, 3), (2, 4)]),
    ],
    ids=["none", "fewer", "more"],
)
def test_a_decision_for_another_graph_is_ignored(
    cache: MeasurementCache, decision: Decision, graph: Any
) -> None:
    remember(cache, "key", decision, MACHINE.devices)
    assert recall(cache, "key", lambda *_: graph, MACHINE) is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content.update(slots=[[2, 0, 0], [0, 0, 0], [1, 0, 0], [3, 0, 0]]),
        lambda content: content.update(slots=[[0, 0, 0], [1, 0, 0], [1, 0, 0], [3, 0, 0]]),
        lambda content: content.update(slots=[[0, 0, -1], [1, 0, 0], [2, 0, 0], [3, 0, 0]]),
        lambda content: content.update(slots=[[0, 1, 0], [1, 0, 0], [2, 0, 0], [3, 0, 0]]),
        lambda content: content.update(slots=[[0, 0], [1, 0], [2, 0], [3, 0]]),
        lambda content: content.update(slots=[[0, -1, 0], [1, 0, 0], [2, 0, 0], [3, 0, 0]]),
        lambda content: content.update(slots=[[float("inf"), 0, 0]]),
        lambda content: content.update(slots=[]),
        lambda content: content.update(slots=[0, 1, 2, 3]),
        lambda content: content.update(measured_us=None),
        lambda content: content.update(operators={"operator_0": 1.0}),
        lambda content: content.update(operators=[]),
        lambda content: content.update(alternatives=None),
        lambda content: content.pop("policy"),
        lambda content: content.pop("rewrite"),
        lambda content: content.pop("duplicates"),
        lambda content: content.update(duplicates=[["operator_0", "copy"]]),
        lambda content: content.pop("kernels"),
        lambda content: content.update(kernels=None),
        lambda content: content.update(kernels=[[[1], [[47]]]]),
        lambda content: content.update(kernels=[[KERNEL_FIELDS, [[float("inf")]]]]),
    ],
)
def test_a_damaged_decision_is_ignored(
    cache: MeasurementCache, decision: Decision, damage: Callable[[dict[str, Any]], Any]
) -> None:
    remember(cache, "key", decision, MACHINE.devices)
    content = cache.read("key")
    damage(content)
    cache.write("key", content)
    assert recall(cache, "key", lambda *_: DIAMOND, MACHINE) is None
