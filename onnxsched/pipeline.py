"""From an ONNX file to an annotated one: the whole story on one screen."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from onnxsched.annotate import annotation_for
from onnxsched.checking import check_numerics, check_portable, run_plain
from onnxsched.comparison import Difference
from onnxsched.decision import Decision, decision_key, recall, remember
from onnxsched.environment import (
    choose_devices,
    describe_environment,
    device_name,
    machine_of,
    pairs_through_host,
)
from onnxsched.inputs import with_given
from onnxsched.loading import Model, Precision, graph_from_model, load_model, with_refusals
from onnxsched.machine import Machine
from onnxsched.memory import fits_on_first
from onnxsched.policies import POLICIES
from onnxsched.profiling.cache import MeasurementCache, directory_for, environment_key
from onnxsched.profiling.measure import Progress
from onnxsched.profiling.sharing import ProfilingWorkers
from onnxsched.proposals import Request
from onnxsched.rewriting import rewritten
from onnxsched.schedule_file import LARGEST_STREAM, ScheduleFile, read_schedule_file, schedule_of
from onnxsched.scheduling import measured_decision
from onnxsched_runtime import cuda
from onnxsched_runtime.annotation import write_annotation
from onnxsched_runtime.device import Device
from onnxsched_runtime.errors import UsageError
from onnxsched_runtime.files import require_target, write_model
from onnxsched_runtime.load import Session
from onnxsched_runtime.variant import Variant

_LEAST_BUDGET_S, _OPERATORS_A_SECOND = 30.0, 12.0
"""Sessions of a large model take longer to prepare, and it has more schedules."""
_SEVERAL = 3.0
"""Times that for several GPUs, which have schedules of their own beside those on the first."""
_DEFAULT_STREAMS = {"cuda": 16, "cpu": min(4, os.cpu_count() or 1)}


@dataclass(frozen=True)
class OptimizeResult:
    """What `optimize` wrote, and what it measured."""

    path: Path
    devices: tuple[Device, ...]
    """Those that the schedule uses."""
    policy: str
    variant: Variant
    """How sessions execute the model."""
    rewrite: str
    """What was made of its operators before: `merge` or `bands-2+twice`, for one, or `none`."""
    stream_count: int
    operator_count: int
    segment_count: int
    capture: str
    refusal: str | None
    """Why it is not captured as one CUDA graph; None where it is."""
    host_reasons: Mapping[str, str]
    through_host: tuple[str, ...]
    """Pairs of GPUs of the schedule whose tensors go through the host: without peer access."""
    measured_us: float
    sequential_us: float | None
    """The same model as one session, in the same rounds; None where no device alone holds it."""
    differences: tuple[Difference, ...]
    """Of each output that no random number reaches, against plain ONNX Runtime."""
    alternatives: tuple[Mapping[str, Any], ...]
    """Every candidate: policy, variant, rewrite, streams, predicted, tried and measured times."""
    from_cache: bool

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        content = dataclasses.asdict(self)
        devices = [str(device) for device in self.devices]
        return {"schema_version": 1, **content, "path": str(self.path), "devices": devices}


def optimize(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    device: str = "auto",
    streams: int | None = None,
    policy: str = "auto",
    schedule: str | os.PathLike[str] | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    inputs: Mapping[str, np.ndarray] | None = None,
    budget_s: float | None = None,
    variants: bool = True,
    split: bool = True,
    precision: Precision = "keep",
    cache_dir: str | os.PathLike[str] | None = "",
    seed: int = 0,
    custom_ops: Sequence[str] = (),
    progress: Progress = lambda what, done, total: None,
) -> OptimizeResult:
    """Schedule a model for this machine and write it annotated.

    Args:
        source: An ONNX model.
        target: Where to write it; nothing is written unless all went well.
        device: `auto` (the first GPU, else the CPU), `cuda:0`, `cpu`; or several of a kind:
            `cuda:0,cuda:1`, or `cpu:0,cpu:1` for groups of threads. Operators are measured on
            those that are like the first, which others are taken to be.
        streams: The most streams to use on each device; 16 on a GPU, up to 4 threads on the CPU if
            None.
        policy: `auto` measures the best few of all; a policy's name is obeyed.
        schedule: A JSON file with a schedule that is obeyed instead, as policy `file`; see
            docs/annotation.md. Its devices are taken where `device` is `auto`.
        shapes: Shapes of inputs whose dimensions are symbols.
        inputs: Values for inputs, with which the model is run and compared; others are drawn at
            random.
        budget_s: For trying variants and schedules; operators are measured before, once. 30 if
            None, more where there are more than 360 operators, and thrice that on several GPUs.
        variants: Also try other layouts and kernels of ONNX Runtime's, and merged operators; see
            `Variant` and `rewriting`.
        split: On several devices, also cut operators on large images into bands of rows, and
            compute operators twice where that is simulated shorter than copying their results.
        precision: `fp16` computes in float16; inputs and outputs keep their types.
        cache_dir: Where measurements are kept; "" for the user's cache if it can be written,
            None for nowhere.
        seed: For the inputs that outputs are compared on.
        custom_ops: Shared libraries with custom operators.
        progress: Told what is being done.

    Raises:
        UsageError: An argument, a shape, a value or `schedule` does not fit, a file is not
            there, or nothing can be kept in `cache_dir`.
        ModelError: The model can't be read or is not supported.
        DeviceError: A device is not available, or all together have no room for the model.
        NumericsError: The scheduled model computes something else than plain ORT.
        OnnxschedError: `target` can't be written.
    """
    _check_arguments(streams, policy, precision, schedule)
    _check_numbers(budget_s, seed)
    require_target("--output", target, schedule, *custom_ops, models=[source])
    directory = directory_for(cache_dir)
    given = None if schedule is None else read_schedule_file(schedule)
    machine = _machine(device, streams, given)
    chosen, libraries = machine.devices[0], tuple(custom_ops)
    environment = describe_environment(chosen)
    cache = MeasurementCache(directory, environment_key(environment, libraries))
    is_gpu = chosen.kind == "cuda"
    workers = ProfilingWorkers(machine.devices) if is_gpu else nullcontext()
    with cuda.one_graph_stream(), workers as worker:
        progress("loading", 0, 1)
        model = load_model(Path(source), chosen, shapes, libraries, precision)
        model = with_given(model, inputs or {})
        graph = graph_from_model(model)
        enough_s = max(_LEAST_BUDGET_S, len(graph) / _OPERATORS_A_SECOND)
        enough_s *= _SEVERAL if is_gpu and len(machine.devices) > 1 else 1.0
        given_s = enough_s if budget_s is None else budget_s
        request = Request(policy, machine, given_s, variants, libraries, split)
        if given is not None:
            obeyed = schedule_of(given, graph, machine)
            request = dataclasses.replace(request, policy="file", schedule=obeyed)
        progress("checking", 0, 1)
        reference = chosen if fits_on_first(graph, machine) else Device("cpu")
        plain = run_plain(model, reference, seed, libraries)
        key = decision_key(model, request)
        decision = kept = recall(
            cache, key, lambda *made: graph_from_model(rewritten(model, *made)), machine
        )
        if decision is None:
            with cuda.other_contexts(machine.devices):
                decision, is_complete = measured_decision(
                    model, cache, plain, request, worker, progress
                )
            if is_complete:
                remember(cache, key, decision, machine.devices)
    model = rewritten(model, decision.rewrite, decision.duplicates)
    model = with_refusals(model, decision.refusals)
    details = _details(model, decision, environment, seed)
    annotation = annotation_for(
        model, decision.schedule, decision.variant, details, decision.kernels
    )
    progress("checking", 0, 1)
    with Session(model.proto, annotation, custom_ops=libraries) as session:
        differences = check_numerics(model, session, plain)
        result = _result(Path(target), model, decision, session, differences, kept is not None)
    write_annotation(model.proto, annotation)
    check_portable(model, reference, libraries)
    write_model(model.proto, target)
    return result


def _check_arguments(
    streams: int | None,
    policy: str,
    precision: str,
    schedule: str | os.PathLike[str] | None,
) -> None:
    if precision not in get_args(Precision):
        raise UsageError(f"There is no precision '{precision}'; there are keep and fp16.")
    if policy != "auto" and policy not in POLICIES:
        raise UsageError(f"There is no policy '{policy}'; there are auto, {', '.join(POLICIES)}.")
    most = LARGEST_STREAM + 1
    if streams is not None and (type(streams) is not int or not 1 <= streams <= most):
        raise UsageError(f"--streams {streams} is no number from 1 to {most}.")
    if schedule is not None and (policy != "auto" or streams is not None):
        option = "--streams" if policy == "auto" else "--policy"
        raise UsageError(f"--schedule and {option} contradict each other; give one.")


def _check_numbers(budget_s: float | None, seed: int) -> None:
    if budget_s is not None and not budget_s >= 0:
        raise UsageError(f"--budget {budget_s} is no time; give seconds, at least 0.")
    if seed < 0:
        raise UsageError(f"--seed {seed} is too small; give at least 0.")


def _machine(device: str, streams: int | None, given: ScheduleFile | None) -> Machine:
    """The devices and streams that are asked for, or those of a schedule that is given."""
    if given is not None and device == "auto":
        device = ",".join(map(str, given.devices))
    devices = choose_devices(device)
    if given is not None:
        return machine_of(devices, given.stream_count)
    return machine_of(devices, streams or _DEFAULT_STREAMS[devices[0].kind])


def _details(
    model: Model, decision: Decision, environment: Mapping[str, Any], seed: int
) -> dict[str, Any]:
    return {
        "policy": decision.policy,
        "rewrite": decision.rewrite,
        "streams": decision.schedule.stream_count,
        "precision": model.precision,
        "bound_shapes": {name: list(shape) for name, shape in model.bound_shapes.items()},
        "device_names": {str(d): device_name(d) for d in decision.schedule.devices},
        "measured_us": decision.measured_us,
        "sequential_us": decision.sequential_us,
        "alternatives": [
            {key: value for key, value in alternative.items() if key != "samples_us"}
            for alternative in decision.alternatives
        ],
        "operators": {name: list(entry) for name, entry in decision.operators.items()},
        "environment": dict(environment),
        "seed": seed,
    }


def _result(
    target: Path,
    model: Model,
    decision: Decision,
    session: Session,
    differences: tuple[Difference, ...],
    from_cache: bool,
) -> OptimizeResult:
    return OptimizeResult(
        path=target,
        devices=decision.schedule.devices,
        policy=decision.policy,
        variant=decision.variant,
        rewrite=decision.rewrite,
        stream_count=decision.schedule.stream_count,
        operator_count=len(model.proto.graph.node),
        segment_count=len(session.plan.segments),
        capture=session.capture,
        refusal=session.refusal,
        host_reasons=model.host_reasons,
        through_host=pairs_through_host(decision.schedule.devices),
        measured_us=decision.measured_us,
        sequential_us=decision.sequential_us,
        differences=differences,
        alternatives=decision.alternatives,
        from_cache=from_cache,
    )
