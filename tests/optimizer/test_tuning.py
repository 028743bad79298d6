"""Candidates are measured, ranked, and the sequential one always takes part."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxsched import exploration, finalists, tuning
from onnxsched.candidates import Candidate, propose
from onnxsched.contraction import Contraction, contract_chains, contract_cost, expand
from onnxsched.cost import OperatorCost, TableCost
from onnxsched.exploration import Trials
from onnxsched.interruption import Interruption
from onnxsched.loading import Model, graph_from_model
from onnxsched.machine import Machine
from onnxsched.outcomes import Outcome, Subject, Tuned
from onnxsched.policies import POLICIES
from onnxsched.policies.search import search
from onnxsched.schedule import Schedule, check_schedule
from onnxsched.simulate import simulate
from onnxsched.tuning import tune
from onnxsched_runtime.device import Device, Placement
from onnxsched_runtime.errors import CaptureError, OnnxschedError
from onnxsched_runtime.variant import DEFAULT_VARIANT
from sample_models import build
from support.models import CPU, MODELS
from support.optimizing import loaded
from support.strategies import GPU

STREAMS = 3
TWO_GPUS = Machine((GPU, Device("cuda", 1)), STREAMS)


def cost_of(model: Model) -> TableCost:
    count = len(model.proto.graph.node)
    return TableCost(tuple(OperatorCost(1.0 + index % 3) for index in range(count)))


def label(candidate: Candidate) -> str:
    return f"{candidate.policy}/{candidate.stream_count}"


def candidates_of(model: Model, device: Device = CPU) -> tuple[Contraction, tuple[Candidate, ...]]:
    return candidates_on(Machine((device,), STREAMS), model, cost_of(model))


def candidates_on(
    machine: Machine, model: Model, cost: TableCost
) -> tuple[Contraction, tuple[Candidate, ...]]:
    graph = graph_from_model(model)
    contraction = contract_chains(graph)
    return contraction, propose(graph, contraction, cost, machine, tuple(POLICIES))


def tune_once(
    model: Model, device: Device = CPU, *, budget_s: float = 60.0, is_refined: bool = False
) -> Tuned:
    contraction, candidates = candidates_of(model, device)
    subject = Subject(model, model, contraction, cost_of(model), candidates, {}, {})
    return tune(
        [subject], Machine((device,), STREAMS),
        budget_s=budget_s, is_refined=is_refined, custom_ops=(),
        progress=lambda what, done, total: None,
    )  # fmt: skip


def tuned(model: Model, device: Device = CPU, budget_s: float = 60.0) -> tuple[Outcome, ...]:
    found = tune_once(model, device, budget_s=budget_s)
    assert found.is_complete
    return found.outcomes


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return loaded(build("tiny"), tmp_path)


def assert_ranked(outcomes: tuple[Outcome, ...]) -> None:
    """Finalists first, the fastest of them in front, and sequential one of them."""
    times = [outcome.measured_us for outcome in outcomes]
    finalists = [us for us in times if us is not None]
    assert times == sorted(finalists) + [None] * (len(times) - len(finalists))
    assert "sequential" in [o.candidate.policy for o in outcomes[: len(finalists)]]


def test_the_few_most_promising_and_sequential_are_measured(model: Model) -> None:
    outcomes = tuned(model)
    assert_ranked(outcomes)
    _, candidates = candidates_of(model)
    assert sorted(label(o.candidate) for o in outcomes) == sorted(map(label, candidates))
    finalists = [o for o in outcomes if o.samples_us]
    assert len(finalists) == 4
    assert {len(o.samples_us) for o in finalists} == {35}
    others = [c.predicted_us for c in candidates if c.policy != "sequential"]
    promising = [o.candidate.predicted_us for o in finalists if o.candidate.policy != "sequential"]
    assert sorted(promising) == sorted(others)[:3]


def test_without_time_only_one_stream_and_the_most_promising_are_built(model: Model) -> None:
    outcomes = tuned(model, budget_s=-1.0)
    assert_ranked(outcomes)
    _, candidates = candidates_of(model)
    assert len(outcomes) == len(candidates)
    finalists = [o.candidate for o in outcomes if o.samples_us]
    assert sorted(c.policy == "sequential" for c in finalists) == [False, True]
    (found,) = [c.predicted_us for c in finalists if c.policy != "sequential"]
    assert found == min(c.predicted_us for c in candidates if c.policy != "sequential")


@pytest.mark.parametrize("name", ["branch", "loop", "sequence", "data_dependent", "chain"])
def test_every_kind_of_model_can_be_tuned(name: str, tmp_path: Path) -> None:
    assert_ranked(tuned(loaded(MODELS[name](), tmp_path)))


def test_the_cpu_has_no_trials(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(exploration, "TrialRunner")
    assert all(outcome.trial_us is None for outcome in tuned(model))


class FakeSession:
    """Runs in the time that its schedule's stream count says."""

    executor = None
    plan = SimpleNamespace(devices=(), segments=())

    def __init__(self, proto: Any, annotation: Any, **_: Any) -> None:
        self._seconds = 0.0001 * len({str(p) for p in annotation.placements.values()})

    def run(self, names: None, feeds: Any) -> None:
        time.sleep(self._seconds)

    def close(self) -> None:
        pass


class OpenedSession(FakeSession):
    """One that is opened for a while."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class FakeTrials:
    """Trials as on a GPU: what is predicted to be slow turns out to be fast."""

    tried: list[Schedule]
    refuse_after = 1000

    def __init__(self, model: Model, contraction: Contraction, *_: Any) -> None:
        self._model = model

    def measure_us(self, contracted: Schedule) -> tuple[float, ...]:
        if len(self.tried) >= self.refuse_after:
            raise CaptureError("no")
        self.tried.append(contracted)
        return (3.0, 1000.0 - len(self.tried), 5000.0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> type[FakeTrials]:
    """Makes tuning believe in a GPU."""
    kind = type("Trials", (FakeTrials,), {"tried": []})
    monkeypatch.setattr(exploration, "TrialRunner", kind)
    monkeypatch.setattr(finalists, "Session", FakeSession)
    return kind


def test_on_a_gpu_all_are_tried_and_what_was_measured_outranks_predictions(
    model: Model, trials: type[FakeTrials]
) -> None:
    outcomes = tuned(model, GPU)
    assert_ranked(outcomes)
    _, candidates = candidates_of(model, GPU)
    by_prediction = sorted(candidates, key=lambda c: c.predicted_us)
    assert trials.tried == [candidate.contracted for candidate in by_prediction]
    assert {label(o.candidate): o.trial_us for o in outcomes} == {
        label(c): 999.0 - number for number, c in enumerate(by_prediction)
    }
    last = [label(c) for c in by_prediction if c.policy != "sequential"][-3:]
    finalists = {label(o.candidate) for o in outcomes if o.samples_us}
    assert finalists == {"sequential/1", *last}


def test_a_spent_budget_tries_nothing_and_still_measures(
    model: Model, trials: type[FakeTrials]
) -> None:
    outcomes = tuned(model, GPU, budget_s=-1.0)
    assert_ranked(outcomes)
    assert trials.tried == []
    assert {outcome.trial_us for outcome in outcomes} == {None}


def test_trials_end_where_a_capture_is_refused(model: Model, trials: type[FakeTrials]) -> None:
    trials.refuse_after = 2
    outcomes = tuned(model, GPU)
    assert_ranked(outcomes)
    assert sum(outcome.trial_us is not None for outcome in outcomes) == 2


def test_a_model_that_is_not_captured_whole_has_no_trials(
    model: Model, trials: type[FakeTrials]
) -> None:
    name = model.proto.graph.node[0].name
    assert_ranked(tuned(replace(model, host_reasons={name: "for once"}), GPU))
    assert trials.tried == []


class SimulatedTrials(FakeTrials):
    """Trials that take what `simulate` predicts for other costs, and more on the first stream."""

    def __init__(self, model: Model, contraction: Contraction, *_: Any) -> None:
        costs = (OperatorCost(1.0 + index % 5) for index in range(len(model.proto.graph.node)))
        self._graph = contraction.graph
        self._cost = contract_cost(contraction, TableCost(tuple(costs)))

    def measure_us(self, contracted: Schedule) -> tuple[float, ...]:
        self.tried.append(contracted)
        on_first = sum(slot.placement.stream == 0 for slot in contracted.slots)
        return (simulate(self._graph, self._cost, contracted).makespan_us + 3.0 * on_first,)


@pytest.fixture
def simulated(
    trials: type[FakeTrials], monkeypatch: pytest.MonkeyPatch
) -> Iterator[type[FakeTrials]]:
    kind = type("Simulated", (SimulatedTrials,), {"tried": []})
    monkeypatch.setattr(exploration, "TrialRunner", kind)
    before = signal.getsignal(signal.SIGINT)
    yield kind
    assert signal.getsignal(signal.SIGINT) is before


def test_local_search_improves_on_the_best_and_its_finds_are_finalists(
    model: Model, simulated: type[FakeTrials]
) -> None:
    found = tune_once(model, GPU, is_refined=True)
    assert_ranked(found.outcomes)
    assert found.is_complete
    contraction, candidates = candidates_of(model, GPU)
    machine = Machine((GPU,), STREAMS)
    proposed = {candidate.contracted for candidate in candidates}
    searched = [o for o in found.outcomes if o.candidate.contracted not in proposed]
    others = [o for o in found.outcomes if o.candidate.contracted in proposed]
    assert len(found.outcomes) == len(candidates) + 4, "one from the simulator, three from trials"
    best_us = sorted(o.trial_us for o in others if o.trial_us is not None)
    for outcome in searched:
        candidate = outcome.candidate
        assert candidate.policy == "search"
        check_schedule(contraction.graph, machine, candidate.contracted)
        check_schedule(graph_from_model(model), machine, candidate.schedule)
        assert candidate.schedule == expand(contraction, candidate.contracted)
    assert min(o.trial_us for o in searched if o.trial_us is not None) < best_us[0]
    assert any(outcome.samples_us for outcome in searched)


def test_what_local_search_leaves_as_it_is_stays_one_candidate(
    model: Model, trials: type[FakeTrials], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trials, "measure_us", lambda self, contracted: (10.0,))
    found = tune_once(model, GPU, is_refined=True)
    _, candidates = candidates_of(model, GPU)
    assert len(found.outcomes) == len(candidates) + 1, "the one from the simulator"


def test_where_nothing_is_to_be_refined_only_candidates_are_tried(
    model: Model, simulated: type[FakeTrials]
) -> None:
    _, candidates = candidates_of(model, GPU)
    assert len(tune_once(model, GPU).outcomes) == len(simulated.tried) == len(candidates)


@pytest.mark.parametrize("trial_count", [1, 3, 60])
def test_ctrl_c_keeps_what_was_tried_and_is_told(
    trial_count: int, model: Model, simulated: type[FakeTrials], monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = SimulatedTrials.measure_us

    def interrupted(self: SimulatedTrials, contracted: Schedule) -> tuple[float, ...]:
        if len(self.tried) + 1 == trial_count:
            os.kill(os.getpid(), signal.SIGINT)
        return measure(self, contracted)

    monkeypatch.setattr(simulated, "measure_us", interrupted)
    found = tune_once(model, GPU, is_refined=True)
    assert not found.is_complete
    assert_ranked(found.outcomes)
    _, candidates = candidates_of(model, GPU)
    assert sum(bool(outcome.samples_us) for outcome in found.outcomes) == 2, "no more are built"
    tried = sum(outcome.trial_us is not None for outcome in found.outcomes)
    assert min(trial_count, len(candidates)) <= tried <= len(candidates) + 4
    assert trial_count <= len(simulated.tried) <= trial_count + 3, "it went on trying"


def test_ctrl_c_at_the_last_candidate_leaves_no_time_for_search(
    model: Model, simulated: type[FakeTrials], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, candidates = candidates_of(model, GPU)
    measure = SimulatedTrials.measure_us

    def interrupted(self: SimulatedTrials, contracted: Schedule) -> tuple[float, ...]:
        if len(self.tried) + 1 == len(candidates):
            os.kill(os.getpid(), signal.SIGINT)
        return measure(self, contracted)

    monkeypatch.setattr(simulated, "measure_us", interrupted)
    found = tune_once(model, GPU, is_refined=True)
    assert not found.is_complete
    assert len(found.outcomes) == len(simulated.tried) == len(candidates)


def test_a_second_ctrl_c_ends_it(
    model: Model, simulated: type[FakeTrials], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted_twice(self: FakeTrials, contracted: Schedule) -> tuple[float, ...]:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the second one was swallowed")

    monkeypatch.setattr(simulated, "measure_us", interrupted_twice)
    with pytest.raises(KeyboardInterrupt):
        tune_once(model, GPU)


def test_over_several_devices_each_is_built_tried_and_closed(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[FakeSession] = []

    class Counted(OpenedSession):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            opened.append(self)

        def close(self) -> None:
            opened.remove(self)

        def run(self, names: None, feeds: Any) -> None:
            most.append(len(opened))
            super().run(names, feeds)

    most: list[int] = []
    monkeypatch.setattr(finalists, "Session", Counted)
    monkeypatch.delattr(exploration, "TrialRunner")
    contraction, candidates = candidates_of(model)
    subject = Subject(model, model, contraction, cost_of(model), candidates, {}, {})

    def tuned_within(budget_s: float) -> tuple[Outcome, ...]:
        found = tune(
            [subject], TWO_GPUS, budget_s=budget_s, custom_ops=(), progress=lambda *_: None
        )
        assert_ranked(found.outcomes)
        assert opened == []
        return found.outcomes

    assert all(outcome.trial_us is not None for outcome in tuned_within(60.0))
    assert most[0] == 1
    assert max(most) == 4
    assert all(outcome.trial_us is None for outcome in tuned_within(0.0))


def test_over_several_gpus_schedules_on_the_first_are_tried_from_its_chains(
    model: Model, trials: type[FakeTrials], monkeypatch: pytest.MonkeyPatch
) -> None:
    contraction, candidates = candidates_on(TWO_GPUS, model, cost_of(model))
    subject = Subject(model, model, contraction, cost_of(model), candidates, {}, {})
    built: list[Outcome] = []

    def in_turn(over: Sequence[Trials]) -> list[Outcome]:
        built.extend(Outcome(c, 10.0) for trials in over for c in trials.subject.candidates)
        return built

    monkeypatch.setattr(tuning, "_tried_in_turn", in_turn)
    found = tune(
        [subject], TWO_GPUS, budget_s=60.0, is_refined=False, custom_ops=(),
        progress=lambda *_: None,
    )  # fmt: skip
    alone = [c for c in candidates if c.schedule.devices == (GPU,)]
    assert len(trials.tried) == len(alone) > 1
    assert all(o.candidate.schedule.devices != (GPU,) for o in built)
    assert len(found.outcomes) == len(candidates) == len(alone) + len(built)
    finalists = [o.candidate for o in found.outcomes if o.samples_us]
    fastest = max(alone, key=lambda c: trials.tried.index(c.contracted))  # the last one tried
    schedules = [candidate.schedule for candidate in finalists]
    assert fastest.schedule in schedules or fastest.policy == "sequential"
    assert any(schedule.devices != (GPU,) for schedule in schedules)


def test_over_several_gpus_the_two_best_forms_are_explored_on_all_of_them(
    model: Model, simulated: type[FakeTrials], monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = graph_from_model(model)
    cost = TableCost(tuple(OperatorCost(100.0) for _ in graph.operators))
    contraction, candidates = candidates_on(TWO_GPUS, model, cost)
    names = ("none", "merge", "merge-inner")
    subjects = [
        Subject(model, replace(model, rewrite=n), contraction, cost, candidates, {}, {})
        for n in names
    ]
    opened: list[tuple[str, tuple[Device, ...]]] = []
    made = simulated.__init__

    def noted(self: Any, of: Model, contracted: Contraction, devices: Any, *rest: Any) -> None:
        opened.append((of.rewrite, tuple(devices)))
        made(self, of, contracted, devices, *rest)

    def in_turn(over: Sequence[Trials]) -> list[Outcome]:
        """One schedule over both GPUs of each form is tried; the last form is the best."""
        found = []
        for number, of in enumerate(over):
            form = of.subject.model.form
            spread = [c for c in of.subject.candidates if len(c.schedule.devices) > 1]
            found += [Outcome(c, form=form) for c in of.subject.candidates if c not in spread[:1]]
            found.append(Outcome(spread[0], 1e6 - number, form=form))
        return found

    monkeypatch.setattr(simulated, "__init__", noted)
    monkeypatch.setattr(tuning, "_tried_in_turn", in_turn)
    found = tune(subjects, TWO_GPUS, budget_s=60.0, custom_ops=(), progress=lambda *_: None)
    both = TWO_GPUS.devices
    assert opened == [("merge-inner", both), ("merge", both), ("none", (GPU,))]
    spread = [o for o in found.outcomes if len(o.candidate.schedule.devices) > 1]
    assert sum(o.trial_us is not None for o in spread if o.form[1] == "none") == 1
    proposed = {candidate.contracted for candidate in candidates}
    for name in ("merge", "merge-inner"):
        of_form = [o for o in spread if o.form[1] == name]
        assert all(o.trial_us is not None for o in of_form)
        searched = [o for o in of_form if o.candidate.contracted not in proposed]
        assert searched
        for outcome in searched:
            check_schedule(contraction.graph, TWO_GPUS, outcome.candidate.contracted)
            check_schedule(graph, TWO_GPUS, outcome.candidate.schedule)
        least_us = min(o.trial_us or 0.0 for o in of_form if o not in searched)
        assert min(o.trial_us or 0.0 for o in searched) < least_us


def test_the_best_on_one_device_is_built_before_what_may_be_too_late(model: Model) -> None:
    _, found = candidates_on(TWO_GPUS, model, cost_of(model))
    alone = [c for c in found if c.schedule.devices == (GPU,)]
    [plain] = [c for c in alone if c.policy == "sequential"]
    best = next(c for c in alone if c is not plain)
    *first, last = best.schedule.slots
    moved = replace(last, placement=Placement(Device("cuda", 1), 0))
    spread = replace(best, schedule=Schedule((*first, moved)))
    merged = (DEFAULT_VARIANT, "merge")
    ranked = [
        Outcome(spread, 1.0),
        Outcome(plain, 2.0, form=merged),
        Outcome(spread, 3.0, form=merged),
        Outcome(best, 4.0),
        Outcome(plain, 5.0),
    ]
    finalists = tuning._finalists(ranked)
    assert [o.trial_us for o in finalists] == [5.0, 1.0, 4.0, 2.0, 3.0]


def test_of_schedules_that_are_hardly_apart_those_on_few_streams_are_built_first(
    model: Model,
) -> None:
    candidates = candidates_of(model, GPU)[1]
    [plain] = [c for c in candidates if c.policy == "sequential"]
    by_streams = {c.stream_count: c for c in candidates if c is not plain}
    few, many = by_streams[2], by_streams[max(by_streams)]
    assert few.stream_count < many.stream_count
    for trial_us, expected in ((100.9, [few, many]), (101.1, [many, few])):
        ranked = [Outcome(many, 100.0), Outcome(few, trial_us), Outcome(plain, 200.0)]
        assert [o.candidate for o in tuning._finalists(ranked)] == [plain, *expected]


def test_what_is_one_chain_is_no_worse_for_not_being_tried(model: Model) -> None:
    [plain] = [c for c in candidates_of(model, GPU)[1] if c.policy == "sequential"]
    tried = Outcome(plain, 2.0, form=(DEFAULT_VARIANT, "merge"))
    for predicted_us, expected in ((1.5, "merge-padded"), (2.5, "merge")):
        chain = replace(plain, predicted_us=predicted_us)
        untried = Outcome(chain, form=(DEFAULT_VARIANT, "merge-padded"))
        ranked = [tried, Outcome(plain, 3.0), untried]
        assert [o.form[1] for o in tuning._finalists(ranked)] == ["none", expected]


@pytest.mark.parametrize("is_limited", [True, False])
def test_what_memory_is_too_small_for_is_left_out_where_memory_is_limited(
    is_limited: bool, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refusing(OpenedSession):
        def __init__(self, proto: Any, annotation: Any, **options: Any) -> None:
            if len(set(annotation.placements.values())) > 1:
                raise OnnxschedError("out of memory")
            super().__init__(proto, annotation, **options)

    monkeypatch.setattr(finalists, "Session", Refusing)
    contraction, candidates = candidates_of(model)
    subject = Subject(model, model, contraction, cost_of(model), candidates, {}, {})
    devices = (GPU, Device("cuda", 1))
    machine = Machine(devices, STREAMS, dict.fromkeys(devices, 1 << 30) if is_limited else {})
    for budget_s in (0.0, 60.0):
        if not is_limited:
            with pytest.raises(OnnxschedError, match="out of memory"):
                tune(
                    [subject], machine, budget_s=budget_s, custom_ops=(), progress=lambda *_: None
                )
            continue
        found = tune(
            [subject], machine, budget_s=budget_s, custom_ops=(), progress=lambda *_: None
        )
        measured = [o for o in found.outcomes if o.samples_us]
        assert measured
        assert {o.candidate.stream_count for o in measured} == {1}


def test_over_several_devices_all_subjects_are_tried_in_one_order(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    contraction, candidates = candidates_of(model)

    def subject(name: str, factor: float) -> Subject:
        form = replace(model, rewrite=name)
        scaled = tuple(replace(c, predicted_us=factor * c.predicted_us) for c in candidates)
        return Subject(model, form, contraction, cost_of(model), scaled, {}, {})

    opened: list[tuple[float, str]] = []

    class Opened(OpenedSession):
        def __init__(self, of: Subject, outcome: Outcome, _: Any) -> None:
            opened.append((outcome.candidate.predicted_us, of.model.rewrite))
            self._seconds = 0.0

    monkeypatch.setattr(tuning, "session_of", Opened)
    machine = Machine((CPU, Device("cpu", 1)), STREAMS)
    end, quiet = time.monotonic() + 60, lambda *_: None
    subjects = (subject("none", 1.0), subject("merge", 0.9))
    trials = [Trials(s, machine, (), end, Interruption(), quiet) for s in subjects]
    outcomes = tuning._over_devices(trials, is_refined=False)
    assert opened == sorted(opened)
    assert [name for _, name in opened] != sorted(name for _, name in opened)
    assert len(opened) == len(outcomes) == 2 * len(candidates)
    assert all(outcome.trial_us is not None for outcome in outcomes)


class Clock:
    """Time that passes where a test says so."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (tuning, exploration):
        monkeypatch.setattr(module, "time", clock)
    return clock


def in_forms(
    model: Model, machine: Machine, names: Sequence[str] = ("none", "merge", "merge-inner")
) -> list[Subject]:
    """What is proposed for a model, for several forms of it."""
    cost = TableCost(tuple(OperatorCost(100.0) for _ in model.proto.graph.node))
    contraction, candidates = candidates_on(machine, model, cost)
    forms = [replace(model, rewrite=name) for name in names]
    return [Subject(model, form, contraction, cost, candidates, {}, {}) for form in forms]


def tune_all(subjects: Sequence[Subject], machine: Machine, budget_s: float) -> Tuned:
    return tune(
        subjects, machine, budget_s=budget_s, custom_ops=(), is_refined=False,
        progress=lambda *_: None,
    )  # fmt: skip


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 60), st.floats(0, 90)), min_size=1, max_size=6))
def test_each_form_may_take_as_much_time_as_it_leaves_and_the_last_one_all(
    forms: list[tuple[float, float]],
) -> None:
    """Of 70 s of 100 s; a form takes so long to prepare and to try."""
    clock, end_s = Clock(), 170.0
    given_s: list[float] = []
    left_s: list[float] = []

    def explored(of: Trials, is_refined: bool) -> tuple[list[Outcome], float]:
        given_s.append(of.deadline - clock.now_s)
        left_s.append(end_s - clock.now_s)
        needed_s, tried_s = forms[len(given_s) - 1]
        if given_s[-1] <= 0:
            return [], 0.0
        clock.now_s += needed_s + tried_s
        return [], needed_s

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tuning, "time", clock)
        patched.setattr(tuning, "explored", explored)
        patched.setattr(tuning, "measure_finalists", lambda *_: [])
        subjects: list[Any] = [None] * len(forms)
        tune_all(subjects, Machine((GPU,), STREAMS), budget_s=100.0)
    assert len(given_s) == len(forms)
    needed_s = 0.0
    for number, (own_s, all_s) in enumerate(zip(given_s, left_s, strict=True)):
        share_s = all_s if number == len(forms) - 1 else all_s / 2
        assert own_s == pytest.approx(share_s if needed_s <= share_s else 0.0)
        needed_s = forms[number][0] if own_s > 0 else 0.0


@pytest.mark.parametrize(("needed_s", "tried"), [(30.0, [5, 5]), (40.0, [0, 0])])
def test_what_can_not_be_prepared_in_time_is_not_begun(
    needed_s: float,
    tried: list[int],
    model: Model,
    trials: type[FakeTrials],
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened: list[Model] = []

    def opening(self: FakeTrials, of: Model, *_: Any) -> None:
        opened.append(of)
        clock.now_s += needed_s

    def measure_us(self: FakeTrials, contracted: Schedule) -> tuple[float, ...]:
        clock.now_s += 1.0
        return (10.0,)

    monkeypatch.setattr(trials, "__init__", opening)
    monkeypatch.setattr(trials, "measure_us", measure_us)
    machine, names = Machine((GPU,), STREAMS), ("none", "merge")
    found = tune_all(in_forms(model, machine, names), machine, budget_s=100.0)
    assert [of.rewrite for of in opened] == (["none", "merge"] if any(tried) else ["none"])
    by_form = [[o for o in found.outcomes if o.form[1] == name] for name in names]
    assert [sum(o.trial_us is not None for o in of) for of in by_form] == tried


def test_trials_leave_a_part_of_the_time_in_which_finalists_are_built(
    model: Model, trials: type[FakeTrials], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow(FakeSession):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            clock.now_s += 1.0

    def measure_us(self: FakeTrials, contracted: Schedule) -> tuple[float, ...]:
        clock.now_s += 1.0
        return (10.0,)

    monkeypatch.setattr(trials, "measure_us", measure_us)
    monkeypatch.setattr(finalists, "Session", Slow)
    outcomes = tuned(model, GPU, budget_s=10.0)
    assert sum(outcome.trial_us is not None for outcome in outcomes) == 7
    assert sum(bool(outcome.samples_us) for outcome in outcomes) == 3


@pytest.mark.parametrize("pace", [0.0, 0.5, 1.0, 1.5])
def test_over_several_gpus_half_of_the_time_is_for_all_and_half_of_the_rest_for_the_best_forms(
    pace: float, model: Model, trials: type[FakeTrials], clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Of 70 s of 100 s; everyone takes so much of what is given."""
    asked: list[tuple[str, float, float]] = []

    def take(what: str, of: Trials) -> None:
        asked.append((what, clock.now_s - 100.0, of.deadline - 100.0))
        clock.now_s += pace * max(0.0, of.deadline - clock.now_s)

    def in_turn(over: Sequence[Trials]) -> list[Outcome]:
        assert len({of.deadline for of in over}) == 1
        take("all", over[0])
        return [
            Outcome(c, form=of.subject.model.form) for of in over for c in of.subject.candidates
        ]

    def on_all(of: Trials, outcomes: Sequence[Outcome]) -> list[Outcome]:
        take("form", of)
        return list(outcomes)

    def explored(of: Trials, is_refined: bool) -> tuple[list[Outcome], float]:
        take("alone", of)
        return [Outcome(candidate) for candidate in of.subject.candidates], 0.0

    monkeypatch.setattr(tuning, "_tried_in_turn", in_turn)
    monkeypatch.setattr(tuning, "explored_on_all", on_all)
    monkeypatch.setattr(tuning, "explored", explored)
    tune(
        in_forms(model, TWO_GPUS), TWO_GPUS, budget_s=100.0, custom_ops=(),
        progress=lambda *_: None,
    )  # fmt: skip
    (_, start_s, end_s), *forms, (_, _, last_s) = asked
    assert [what for what, *_ in asked] == ["all", *["form"] * len(forms), "alone"]
    assert (start_s, end_s, last_s) == pytest.approx((0.0, 35.0, 70.0))
    assert len(forms) == (2 if pace <= 1 else 0)
    for waiting, (_, start_s, end_s) in zip((1, 0), forms, strict=False):
        assert 52.5 - end_s == pytest.approx(waiting * (end_s - start_s))


@pytest.mark.parametrize("device_count", [2, 3])
def test_over_several_devices_three_are_built_even_without_time(
    device_count: int, model: Model, trials: type[FakeTrials]
) -> None:
    machine = Machine(tuple(Device("cuda", index) for index in range(device_count)), STREAMS)
    found = tune_all(in_forms(model, machine, ["none"]), machine, budget_s=-1.0)
    assert_ranked(found.outcomes)
    built = [o.candidate for o in found.outcomes if o.samples_us]
    assert len(built) == 3
    assert any(c.schedule.devices == (GPU,) for c in built if c.policy != "sequential")


@pytest.mark.parametrize("others", [3, 4])
def test_over_several_devices_nothing_is_tried_where_all_are_finalists(
    others: int, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finalists, "Session", OpenedSession)
    machine = Machine((CPU, Device("cpu", 1)), STREAMS)
    [subject] = in_forms(model, machine, ["none"])
    plain = [c for c in subject.candidates if c.policy == "sequential"]
    chosen = [c for c in subject.candidates if c not in plain][:others]
    found = tune_all([replace(subject, candidates=(*plain, *chosen))], machine, budget_s=60.0)
    assert len(found.outcomes) == 1 + others
    assert all((o.trial_us is not None) == (others > 3) for o in found.outcomes)
    assert sum(bool(o.samples_us) for o in found.outcomes) == 4


def test_each_finalist_is_built_from_its_own_form(
    model: Model, trials: type[FakeTrials], monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[str] = []
    real = finalists.session_of

    def session_of(of: Subject, outcome: Outcome, custom_ops: tuple[str, ...]) -> Any:
        assert of.model.form == outcome.form
        built.append(of.model.rewrite)
        return real(of, outcome, custom_ops)

    monkeypatch.setattr(finalists, "session_of", session_of)
    machine = Machine((GPU,), STREAMS)
    found = tune_all(in_forms(model, machine), machine, budget_s=60.0)
    assert sorted(built) == sorted(o.form[1] for o in found.outcomes if o.samples_us)
    assert len(set(built)) > 1


def limited(*devices: Device) -> Machine:
    return Machine(devices, STREAMS, dict.fromkeys(devices, 1 << 30))


def refuse_where(is_too_large: Callable[[Any], bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let annotations that are too large have no session."""

    class Refusing(OpenedSession):
        def __init__(self, proto: Any, annotation: Any, **options: Any) -> None:
            if is_too_large(annotation):
                raise OnnxschedError("out of memory")
            super().__init__(proto, annotation, **options)

    monkeypatch.setattr(finalists, "Session", Refusing)


def test_where_nothing_over_several_gpus_has_room_one_is_enough(
    model: Model, trials: type[FakeTrials], monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_where(lambda annotation: len(annotation.devices) > 1, monkeypatch)
    machine = limited(*TWO_GPUS.devices)
    found = tune_all(in_forms(model, machine, ["none"]), machine, budget_s=60.0)
    built = [o.candidate for o in found.outcomes if o.samples_us]
    assert len(built) > 1
    assert {candidate.schedule.devices for candidate in built} == {(GPU,)}


@pytest.mark.parametrize("budget_s", [-1.0, 60.0])
@pytest.mark.parametrize(
    "devices", [(GPU,), TWO_GPUS.devices, (CPU, Device("cpu", 1))], ids=["GPU", "GPUs", "CPUs"]
)
def test_where_nothing_has_room_the_error_says_so(
    devices: tuple[Device, ...], budget_s: float, model: Model, trials: type[FakeTrials],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    refuse_where(lambda annotation: True, monkeypatch)
    machine = limited(*devices)
    with pytest.raises(OnnxschedError, match="out of memory"):
        tune_all(in_forms(model, machine, ["none"]), machine, budget_s)


@pytest.mark.parametrize("is_limited", [True, False])
def test_chains_without_room_end_the_trials_where_memory_is_limited(
    is_limited: bool, model: Model, trials: type[FakeTrials], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(self: FakeTrials, *_: Any) -> None:
        raise OnnxschedError("out of memory")

    monkeypatch.setattr(trials, "__init__", refused)
    machine = limited(GPU) if is_limited else Machine((GPU,), STREAMS)
    subjects = in_forms(model, machine, ["none"])
    if is_limited:
        assert_ranked(tune_all(subjects, machine, budget_s=60.0).outcomes)
    else:
        with pytest.raises(OnnxschedError, match="out of memory"):
            tune_all(subjects, machine, budget_s=60.0)


def test_a_model_with_host_pieces_is_tried_over_several_gpus_as_it_will_run(
    model: Model, trials: type[FakeTrials], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finalists, "Session", OpenedSession)
    [subject] = in_forms(model, TWO_GPUS, ["none"])
    reasons = {model.proto.graph.node[0].name: "for once"}
    hosted = replace(subject, model=replace(subject.model, host_reasons=reasons))
    found = tune_all([hosted], TWO_GPUS, budget_s=60.0)
    assert trials.tried == []
    assert all(outcome.trial_us is not None for outcome in found.outcomes)


@pytest.mark.parametrize("count", [2, 3])
def test_two_candidates_are_both_finalists_and_not_tried(
    count: int, model: Model, trials: type[FakeTrials]
) -> None:
    machine = Machine((GPU,), STREAMS)
    [subject] = in_forms(model, machine, ["none"])
    plain = [c for c in subject.candidates if c.policy == "sequential"]
    chosen = [*plain, *(c for c in subject.candidates if c not in plain)][:count]
    found = tune_all([replace(subject, candidates=tuple(chosen))], machine, budget_s=60.0)
    assert len(trials.tried) == (0 if count == 2 else 3)
    assert all(outcome.samples_us for outcome in found.outcomes)


def test_search_on_the_machine_starts_on_few_streams_and_goes_on_from_there(
    model: Model, simulated: type[FakeTrials], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[tuple[int, Schedule]] = []

    def noted(graph: Any, cost: Any, machine: Machine, *, starts: Any, effort: int) -> Schedule:
        if found:
            assert starts[0](graph, cost, machine) == simulated.tried[-1]
        made = search(graph, cost, machine, starts=starts, effort=effort)
        found.append((machine.stream_count, made))
        return made

    monkeypatch.setattr(exploration, "search", noted)
    [subject] = in_forms(model, TWO_GPUS, ["none"])
    end_s = clock.now_s + 60
    trials = Trials(subject, TWO_GPUS, (), end_s, Interruption(), lambda *_: None)
    spread = [Outcome(c) for c in subject.candidates if len(c.schedule.devices) > 1]
    exploration.explored_on_all(trials, spread)
    assert [stream_count for stream_count, _ in found] == [2, STREAMS]


def test_what_search_finds_has_room_on_every_gpu(
    model: Model, simulated: type[FakeTrials], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    [subject] = in_forms(model, TWO_GPUS, ["none"])
    spread = [Outcome(c) for c in subject.candidates if len(c.schedule.devices) > 1]
    known = {outcome.candidate.contracted for outcome in spread}
    end_s = clock.now_s + 60
    trials = Trials(subject, TWO_GPUS, (), end_s, Interruption(), lambda *_: None)

    def is_found(too_full: str | None) -> bool:
        monkeypatch.setattr(exploration, "too_full", lambda *_: too_full)
        outcomes = exploration.explored_on_all(trials, spread)
        return any(outcome.candidate.contracted not in known for outcome in outcomes)

    assert is_found(None)
    assert not is_found("cuda:1 has no room")
