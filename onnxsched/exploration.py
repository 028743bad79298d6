"""Try the schedules of one model on GPUs, from captured chains, and look for better ones."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

from onnxsched.annotate import portable_schedule
from onnxsched.calibration import calibrate
from onnxsched.candidates import Candidate
from onnxsched.contraction import ContractedCost, contract_cost, expand, settled
from onnxsched.interruption import Interruption
from onnxsched.machine import Machine
from onnxsched.memory import too_full
from onnxsched.outcomes import Outcome, Subject, expected
from onnxsched.policies import POLICIES, STARTS
from onnxsched.policies.search import Start, search
from onnxsched.profiling.measure import Progress
from onnxsched.refinement import refine
from onnxsched.schedule import Schedule
from onnxsched.simulate import simulate
from onnxsched.trial import TrialRunner
from onnxsched_runtime.errors import CaptureError, OnnxschedError

_CALIBRATION_COUNT = 8
"""Trials that the contention of the machine is fitted to."""
_START_COUNT = 3
"""Schedules that local search starts from."""
_NARROW = 2
"""Streams of each device among which search finds more in the same time."""
_EFFORT = 2
"""Of search, over several devices, where it knows the contention of the machine."""


@dataclass(frozen=True)
class Trials:
    """What trying the schedules of one subject needs."""

    subject: Subject
    machine: Machine
    custom_ops: tuple[str, ...]
    deadline: float
    interruption: Interruption
    progress: Progress

    def is_time_left(self) -> bool:
        """Whether another schedule may be tried."""
        return time.monotonic() < self.deadline and not self.interruption.is_requested


def explored(trials: Trials, is_refined: bool) -> tuple[list[Outcome], float]:
    """The outcomes of a subject's trials, or its candidates untried where there is no use.

    Returns:
        These, and how many seconds it took to prepare the trials.
    """
    subject = trials.subject
    outcomes = [Outcome(candidate, form=subject.model.form) for candidate in subject.candidates]
    tried = sorted(outcomes, key=expected)
    devices = trials.machine.devices
    is_possible = devices[0].kind == "cuda" and not subject.model.host_reasons
    if not is_possible or len(tried) <= 2 or not trials.is_time_left():
        return tried, 0.0
    trials.progress("preparing trials", 0, len(tried))
    start, needed_s = time.monotonic(), 0.0
    with _as_far_as_it_goes(trials), _runner(trials) as runner:
        needed_s = time.monotonic() - start
        _try_all(trials, tried, runner)
        if any(outcome.trial_us is not None for outcome in tried):
            _look_further(trials, tried, runner, is_refined)
    return tried, needed_s


def explored_on_all(trials: Trials, outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The outcomes of a subject's schedules over several GPUs, tried, and better ones.

    From captured chains on every GPU: those that were tried as they will run already are where
    local search starts from, beside what is tried here.

    Args:
        trials: Of the subject.
        outcomes: All of its schedules over several devices.
    """
    subject = trials.subject
    tried = sorted(outcomes, key=expected)
    found: list[Outcome] = []
    trials.progress("preparing trials", 0, len(tried))
    with _as_far_as_it_goes(trials), _runner(trials) as runner:
        _try_all(trials, tried, runner)
        cost = _calibrated(subject, tried)
        tried = [_predicted_again(subject, cost, outcome) for outcome in tried]
        if trials.is_time_left():
            for outcome in _searched_on_all(trials, cost, tried, runner):
                found.append(outcome)  # at once: the next may find the model uncapturable
            _refine_into(found, trials, cost, [*found, *tried], runner)
    return [*tried, *(outcome for outcome in found if _fits(trials, outcome))]


@contextmanager
def _as_far_as_it_goes(trials: Trials) -> Iterator[None]:
    """Keep what has been tried where the model can't be captured, or all chains have no room."""
    try:
        yield
    except CaptureError:
        pass
    except OnnxschedError:  # chains need more memory than schedules
        if not trials.machine.is_limited:
            raise


def _runner(trials: Trials) -> TrialRunner:
    subject = trials.subject
    devices = trials.machine.devices
    return TrialRunner(subject.model, subject.contraction, devices, trials.custom_ops)


def _fits(trials: Trials, outcome: Outcome) -> bool:
    contracted = outcome.candidate.contracted
    order = [slot.operator for slot in contracted.slots]
    graph = trials.subject.contraction.graph
    return too_full(graph, trials.machine, order, contracted.placement_of) is None


def _try_all(trials: Trials, tried: list[Outcome], runner: TrialRunner) -> None:
    """Put the outcomes of trials in the place of what is not tried yet, while there is time."""
    for index, outcome in enumerate(tried):
        if outcome.trial_us is not None:
            continue
        if not trials.is_time_left():
            break
        trials.progress("trying schedules", index, len(tried))
        trial_us = _median_us(runner, outcome.candidate.contracted)
        tried[index] = replace(outcome, trial_us=trial_us)


def _look_further(
    trials: Trials, tried: list[Outcome], runner: TrialRunner, is_refined: bool
) -> None:
    """Predict again by what was tried, and add what a search finds."""
    subject = trials.subject
    cost = _calibrated(subject, tried)
    tried[:] = [_predicted_again(subject, cost, outcome) for outcome in tried]
    if is_refined and trials.is_time_left():
        tried += _searched(trials, cost, tried, runner)


def _median_us(runner: TrialRunner, contracted: Schedule) -> float:
    return statistics.median(runner.measure_us(contracted))


def _calibrated(subject: Subject, tried: Sequence[Outcome]) -> ContractedCost:
    """The cost of the chains, with the contention that explains a few of the measured times."""
    ranked = sorted(tried, key=expected)
    step = max(1, len(ranked) // _CALIBRATION_COUNT)
    chosen = [*ranked[::step], *(o for o in ranked if o.candidate.policy == "sequential")]
    graph = subject.contraction.graph
    measured = [(o.candidate.contracted, o.trial_us) for o in chosen if o.trial_us is not None]
    contention = calibrate(graph, contract_cost(subject.contraction, subject.cost), measured)
    return contract_cost(subject.contraction, replace(subject.cost, contention=contention))


def _predicted_again(subject: Subject, cost: ContractedCost, outcome: Outcome) -> Outcome:
    candidate = outcome.candidate
    timeline = simulate(subject.contraction.graph, cost, candidate.contracted)
    return replace(outcome, candidate=replace(candidate, predicted_us=timeline.makespan_us))


def _searched(
    trials: Trials, cost: ContractedCost, tried: Sequence[Outcome], runner: TrialRunner
) -> list[Outcome]:
    """What search finds on the calibrated simulator, and then on the machine."""
    subject = trials.subject
    graph = subject.contraction.graph
    trials.progress("searching", 0, 1)
    start = settled(subject.contraction, POLICIES["search"](graph, cost, trials.machine))
    found = _found(subject, cost, start, _median_us(runner, start))
    all_found = [found]
    _refine_into(all_found, trials, cost, [found, *tried], runner)
    return all_found


def _searched_on_all(
    trials: Trials, cost: ContractedCost, tried: Sequence[Outcome], runner: TrialRunner
) -> Iterator[Outcome]:
    """What search finds over several devices, on few streams and then on all, both tried.

    It takes more steps than where it proposes: the contention is that of this machine now, and
    steps on the simulator are a tenth of the time of trials.
    """
    subject, machine = trials.subject, trials.machine
    graph = subject.contraction.graph
    best = min(tried, key=expected).candidate.contracted
    starts: list[Start] = [*STARTS, _start(best)]
    for number, stream_count in enumerate(dict.fromkeys((_NARROW, machine.stream_count))):
        if not trials.is_time_left():
            break
        trials.progress("searching", number, 2)
        among = replace(machine, stream_count=min(stream_count, machine.stream_count))
        made = search(graph, cost, among, starts=starts, effort=_EFFORT)
        schedule = settled(subject.contraction, made)
        yield _found(subject, cost, schedule, _median_us(runner, schedule))
        starts.insert(0, _start(schedule))


def _start(schedule: Schedule) -> Start:
    """What search starts from where its machine has all streams of a schedule."""
    used = {slot.placement for slot in schedule.slots}
    return lambda graph, cost, machine: schedule if used <= set(machine.placements) else None


def _found(
    subject: Subject, cost: ContractedCost, contracted: Schedule, trial_us: float
) -> Outcome:
    """A schedule that search came to."""
    expanded = expand(subject.contraction, contracted)
    candidate = Candidate(
        "search",
        portable_schedule(subject.portable, subject.model, expanded),
        contracted,
        simulate(subject.contraction.graph, cost, contracted).makespan_us,
    )
    return Outcome(candidate, trial_us, form=subject.model.form)


def _refine_into(
    found: list[Outcome],
    trials: Trials,
    cost: ContractedCost,
    tried: Sequence[Outcome],
    runner: TrialRunner,
) -> None:
    """Add what local search on the machine makes of the best schedules that were tried."""
    graph = trials.subject.contraction.graph
    best = sorted(tried, key=expected)[:_START_COUNT]
    placements = trials.machine.placements
    for number, outcome in enumerate(best):
        trials.progress("refining schedules", number, len(best))
        better = refine(
            graph,
            outcome.candidate.contracted,
            placements,
            lambda schedule: _median_us(runner, schedule),
            trials.is_time_left,
            seed=number,
            settle=partial(settled, trials.subject.contraction),
        )
        if better.schedule != outcome.candidate.contracted:  # else it is a candidate already
            found.append(_found(trials.subject, cost, better.schedule, better.measured_us))
