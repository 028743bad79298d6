"""What no schedule of a model can be shorter than, from the profile that `optimize` has cached."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

from onnxsched.contraction import contract_chains, contract_cost
from onnxsched.cost import TableCost
from onnxsched.environment import describe_environment
from onnxsched.loading import Model, graph_from_model
from onnxsched.profiling.cache import MeasurementCache, environment_key
from onnxsched.profiling.isolation import ProfilingWorker
from onnxsched.profiling.measure import measure_profile
from onnxsched.simulate import critical_path_us, total_us
from onnxsched.variants import lowered_model
from onnxsched_runtime.annotation import read_annotation
from onnxsched_runtime.device import Device
from onnxsched_runtime.files import read_model


def bounds_us(path: Path, device: Device, cache_dir: Path) -> dict[str, float]:
    """Sums over the operators of an annotated model as it is executed, in microseconds.

    Times are those of operators alone, views inside chains left out.

    Args:
        path: What `optimize` wrote.
        device: Where it was optimized, the first of several.
        cache_dir: What `optimize` was given.

    Returns:
        `operator_sum_us`, what one stream takes; `critical_path_us`, what infinitely many would if
        operators did not slow each other; and `sm_time_us`, the sum of durations times the share
        of the multiprocessors that operators cover, which is 0 on the CPU.
    """
    proto = read_model(path)
    annotation = read_annotation(proto)
    model = Model(proto, annotation.tensors, annotation.host_reasons, {}, proto)
    if device.kind == "cuda":
        model = lowered_model(model, annotation.variant, device, ())
    cache = MeasurementCache(cache_dir, environment_key(describe_environment(device), ()))
    with ProfilingWorker() if device.kind == "cuda" else nullcontext() as worker:
        profile = measure_profile(model, device, cache, (), lambda *_: None, worker)
    operators = graph_from_model(model)
    cost = TableCost(tuple(profile.cost(operator.name) for operator in operators.operators))
    contraction = contract_chains(operators)
    graph, costs = contraction.graph, contract_cost(contraction, cost)
    alone = [costs.operator(chain, device) for chain in range(len(graph))]
    return {
        "operator_sum_us": total_us(graph, costs, device),
        "critical_path_us": critical_path_us(graph, costs, device),
        "sm_time_us": sum(chain.duration_us * chain.sm_share for chain in alone),
    }
