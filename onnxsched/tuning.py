"""Choose among candidates by measuring them on the machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace

from onnxsched.exploration import Trials, explored, explored_on_all
from onnxsched.finalists import measure_finalists, session_of
from onnxsched.inputs import model_inputs
from onnxsched.interruption import Interruption
from onnxsched.loading import AS_LOADED
from onnxsched.machine import Machine
from onnxsched.outcomes import Outcome, Subject, Tuned, expected
from onnxsched.profiling.measure import Progress
from onnxsched.racing import timed_run
from onnxsched_runtime.errors import OnnxschedError

_TRIALS_SHARE = 0.7
"""Of the budget; the rest is for the finalists."""
_SAMPLE_COUNT = 12
"""Runs of a schedule that is tried as it will run."""
_HARDLY_APART = 1.01
"""What trials are from one to the next."""
_FINALIST_COUNT = 3
"""Candidates that are built as they will run, beside sequential ones."""
_FORM_COUNT = 2
"""Forms of the model that are explored over several GPUs."""


def tune(
    subjects: Sequence[Subject],
    machine: Machine,
    *,
    budget_s: float,
    is_refined: bool = True,
    custom_ops: tuple[str, ...],
    progress: Progress,
) -> Tuned:
    """Measure candidates and rank them.

    All are tried in the order of their predictions while the budget lasts: on one GPU, where the
    model is captured whole, from sessions of its chains; over several devices built as they will
    run, one after another, all subjects' in one order, and then, for the best subject, from chains
    that are captured on every GPU. Of schedules on one of them only the first subject's are tried
    from its chains. The best few, of one stream too, are then built as they will run and measured
    in interleaved rounds: the model in one stream as it was loaded and the most promising first,
    others while the budget lasts. Ctrl-C ends what a budget ends, and what is best so far is kept.

    Args:
        subjects: Variants and rewrites of one model, and what is proposed for each, the most
            promising first.
        machine: Where to measure; its streams are the cap for schedules that are found here.
        budget_s: For all of it. On one device each subject has half of what those before it left
            of the trials' share, and the last has all; what could not even be prepared in time is
            not tried.
        is_refined: Spend what is left of it on local search from the best schedules.
        custom_ops: Libraries of custom operators.
        progress: Told what is being done.
    """
    with Interruption() as interruption:
        start = time.monotonic()
        end = start + _TRIALS_SHARE * budget_s
        trials = [Trials(s, machine, custom_ops, end, interruption, progress) for s in subjects]
        tried = _on_one_device if len(machine.devices) == 1 else _over_devices
        outcomes = tried(trials, is_refined)
        ranked = sorted(outcomes, key=expected)
        measured = measure_finalists(
            subjects,
            _finalists(ranked),
            machine,
            custom_ops,
            lambda: time.monotonic() < start + budget_s and not interruption.is_requested,
            progress,
        )
        measured.sort(key=lambda outcome: statistics.median(outcome.samples_us))
        done = {id(outcome.candidate) for outcome in measured}
        left = [outcome for outcome in ranked if id(outcome.candidate) not in done]
        return Tuned((*measured, *left), not interruption.is_requested)


def _finalists(ranked: Sequence[Outcome]) -> list[Outcome]:
    """The model in one stream as it was loaded, the best schedule, then others.

    Among them the best in one stream, and the best on one device. Of schedules that were hardly
    apart those on fewer streams come first: each stream has a session, which holds memory.
    """
    sequential = [o for o in ranked if o.candidate.policy == "sequential"]
    plain = [outcome for outcome in sequential if outcome.form == AS_LOADED]
    streams = [outcome for outcome in sequential if outcome not in plain]
    streams.sort(key=_alone_us)
    others = [o for o in ranked if o.candidate.policy != "sequential"]
    least_us = min((o.trial_us for o in others if o.trial_us is not None), default=0.0)
    others.sort(key=lambda o: _streams_if_near(o, _HARDLY_APART * least_us))
    alone = [o for o in others if len(o.candidate.schedule.devices) == 1]
    best = others[:_FINALIST_COUNT]
    wanted = [*plain, *best[:1], *alone[:1], *streams[:1], *best[1:]]
    return list({id(outcome): outcome for outcome in wanted}.values())


def _streams_if_near(outcome: Outcome, most_us: float) -> tuple[bool, int]:
    """By what schedules are ranked that were hardly slower than the best; others stay behind."""
    is_near = outcome.trial_us is not None and outcome.trial_us <= most_us
    return (not is_near, outcome.candidate.stream_count if is_near else 0)


def _alone_us(outcome: Outcome) -> float:
    """The time in one stream: what is one chain is not tried, but predictions hold there."""
    return outcome.candidate.predicted_us if outcome.trial_us is None else outcome.trial_us


def _on_one_device(trials: Sequence[Trials], is_refined: bool) -> list[Outcome]:
    """The outcomes of all subjects, one after another."""
    outcomes: list[Outcome] = []
    needed_s = 0.0
    for number, of in enumerate(trials):
        now = time.monotonic()
        is_last = number == len(trials) - 1
        deadline = of.deadline if is_last else now + (of.deadline - now) / 2
        if needed_s > deadline - now:  # it would be prepared and not tried
            deadline = now
        tried, needed_s = explored(replace(of, deadline=deadline), is_refined)
        outcomes += tried
    return outcomes


def _over_devices(trials: Sequence[Trials], is_refined: bool) -> list[Outcome]:
    """The outcomes of all subjects, and of the first one's schedules on the first device."""
    first, now = trials[0], time.monotonic()
    if sum(len(of.subject.candidates) for of in trials) <= 1 + _FINALIST_COUNT:
        return _tried_in_turn([replace(of, deadline=now) for of in trials])  # all are finalists
    if first.machine.devices[0].kind != "cuda" or first.subject.model.host_reasons:
        return _tried_in_turn(trials)
    alone, spread = _on_first_device(first)
    others = [replace(of, deadline=spread.deadline) for of in trials[1:]]
    outcomes = _tried_in_turn([spread, *others])
    if is_refined:
        deadline = (spread.deadline + first.deadline) / 2
        outcomes = _best_forms_explored(trials, outcomes, deadline)
    return [*outcomes, *explored(alone, is_refined)[0]]


def _best_forms_explored(
    trials: Sequence[Trials], outcomes: Sequence[Outcome], deadline: float
) -> list[Outcome]:
    """The outcomes with what is found for the forms of the model that are best over several GPUs.

    For more than the best one: what a form is worth shows once its schedules are improved.
    """
    spread = [o for o in outcomes if len(o.candidate.schedule.devices) > 1]
    forms = list(dict.fromkeys(outcome.form for outcome in sorted(spread, key=expected)))
    of_form = {of.subject.model.form: of for of in trials if not of.subject.model.host_reasons}
    chosen = [of_form[form] for form in forms[:_FORM_COUNT] if form in of_form]
    found = list(outcomes)
    for number, of in enumerate(chosen):
        now = time.monotonic()
        best = replace(of, deadline=now + (deadline - now) / (len(chosen) - number))
        if not best.is_time_left():
            break
        own = [outcome for outcome in spread if outcome.form == of.subject.model.form]
        known = set(map(id, own))
        found = [outcome for outcome in found if id(outcome) not in known]
        found += explored_on_all(best, own)
    return found


def _on_first_device(trials: Trials) -> tuple[Trials, Trials]:
    """The trials of schedules that use the first device only, and in half the time the others."""
    machine = replace(trials.machine, devices=trials.machine.devices[:1])
    subject, now = trials.subject, time.monotonic()
    alone = [c for c in subject.candidates if c.schedule.devices == machine.devices]
    spread = [c for c in subject.candidates if c.schedule.devices != machine.devices]
    first = replace(trials, subject=replace(subject, candidates=tuple(alone)), machine=machine)
    others = replace(
        trials,
        subject=replace(subject, candidates=tuple(spread)),
        deadline=now + (trials.deadline - now) / 2,
    )
    return first, others


def _tried_in_turn(trials: Sequence[Trials]) -> list[Outcome]:
    """The outcomes of all candidates, each built as it will run, timed and closed.

    The most promising of all subjects comes first. What can't be built, for want of memory say,
    is left out where anything else is left; else the finalists, those on one device too, tell.
    """
    waiting = [
        (Outcome(candidate, form=of.subject.model.form), of)
        for of in trials
        for candidate in of.subject.candidates
    ]
    waiting.sort(key=lambda pair: expected(pair[0]))
    first, count = trials[0].subject.portable, len(waiting)
    feeds = model_inputs(first, seed=0)
    tried: list[Outcome] = []
    refused: list[Outcome] = []
    while waiting and waiting[0][1].is_time_left():
        outcome, of = waiting.pop(0)
        of.progress("trying schedules", len(tried), count)
        try:
            with session_of(of.subject, outcome, of.custom_ops) as session:
                run = timed_run(session, feeds)
                samples_us = run(_SAMPLE_COUNT)
        except OnnxschedError:
            if not of.machine.is_limited:
                raise
            refused.append(outcome)
        else:
            tried.append(replace(outcome, trial_us=statistics.median(samples_us)))
    return [*tried, *(outcome for outcome, _ in waiting)] or refused
