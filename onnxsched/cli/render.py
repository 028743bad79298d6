"""Values as text: sentences and tables on stdout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnxsched.benchmark import BenchResult
    from onnxsched.comparison import Difference
    from onnxsched.doctor import Diagnosis
    from onnxsched.inspection import Inspection
    from onnxsched.pipeline import OptimizeResult
    from onnxsched.throughput import ThroughputResult


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print aligned columns, the first to the left, the others to the right."""
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    for cells in (columns, *rows):
        padded = [cells[0].ljust(widths[0])]
        padded += [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        print("  ".join(padded).rstrip())


def _us(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _form(variant: object, rewrite: object) -> str:
    """E.g. `nhwc+bias`, or `nhwc+bias after merge`."""
    return str(variant) if rewrite == "none" else f"{variant} after {rewrite}"


def optimize_result(result: OptimizeResult) -> None:
    """What was tried, what was chosen, what it brings."""
    rows = [
        (
            f"{entry['policy']}/{entry['streams']}",
            str(len(entry["devices"])),
            entry["variant"],
            entry["rewrite"],
            _us(entry["predicted_us"]),
            _us(entry["tried_us"]),
            _us(entry["measured_us"]),
        )
        for entry in result.alternatives
        if entry["measured_us"] is not None or entry["tried_us"] is not None
    ]
    measured = ("predicted us", "tried us", "measured us")
    _table(("policy/streams", "devices", "variant", "rewrite", *measured), rows)
    gain = result.sequential_us / result.measured_us if result.sequential_us else None
    print(
        f"\nChose {result.policy} on {result.stream_count} stream(s) of "
        f"{', '.join(map(str, result.devices))}, {_form(result.variant, result.rewrite)}: "
        f"{result.measured_us:.1f} us, "
        + (
            "where one device alone has not the memory"
            if gain is None
            else f"{gain:.2f} times the speed of the model unscheduled"
        )
        + (" (from the cache)." if result.from_cache else ".")
    )
    if gain is not None and gain < 1:
        print("One stream is faster on this machine; --policy auto would have chosen it.")
    print(
        f"{result.operator_count} operators in {result.segment_count} segment(s), " + _how(result)
    )
    _tell_of_detours(result.through_host)
    print(f"{_agreement(result.differences)} Wrote {result.path}.")


def _tell_of_detours(through_host: Sequence[str]) -> None:
    if through_host:
        print(
            f"No peer access between {', '.join(through_host)}: tensors that cross go through the "
            "host, which takes longer."
        )


def _agreement(differences: Sequence[Difference]) -> str:
    if not differences:
        return "Random numbers reach every output, so none was compared."
    worst = max(difference.relative for difference in differences)
    if all(difference.is_identical for difference in differences):
        return "Outputs are identical to plain ONNX Runtime's."
    return f"Outputs are within {worst:.1e} (relative) of plain ONNX Runtime's."


def _how(result: OptimizeResult) -> str:
    """How the segments are executed."""
    if result.devices[0].kind == "cpu":
        return f"on {result.stream_count} worker thread(s)."
    if result.host_reasons:
        count = len(result.host_reasons)
        return f"{count} operators on the host; `onnxsched inspect` says why."
    refused = f" Refused: {result.refusal}" if result.refusal else ""
    how = {"whole": "in one CUDA graph.", "ort": "each in a CUDA graph of ONNX Runtime's."}
    return how.get(result.capture, "launched at every run.") + refused


def bench_result(result: BenchResult) -> None:
    """Times and ratios of every arm."""
    rows = []
    for arm in result.arms:
        ratio = None if arm.name == "schedule" else result.ratio_to(arm.name)
        shown = arm.device or arm.latency
        rows.append(
            (
                arm.name,
                _us(arm.device.median_us if arm.device else None),
                _us(shown.p99_us),
                _us(arm.latency.median_us),
                "" if arm.memory_nbytes is None else f"{arm.memory_nbytes / 1e6:.0f}",
                "" if ratio is None else f"{ratio.value:.2f}",
                "" if ratio is None else f"{ratio.low:.2f}-{ratio.high:.2f}",
            )
        )
    columns = ("arm", "device us", "p99 us", "latency us", "memory MB", "speed-up", "95 %")
    _table(columns, rows)
    print(
        f"\n{result.model} on {result.environment['device']} "
        f"({', '.join(map(str, result.devices))}), {result.policy}, "
        f"{_form(result.variant, result.rewrite)}."
    )
    _tell_of_detours(result.through_host)
    for arm in result.arms:
        if arm.refusal:
            print(f"{arm.name} is not captured as its name says: {arm.refusal}")
        shown = arm.device or arm.latency
        if shown.variation > 0.05:
            print(f"{arm.name} varies by {shown.variation:.0%}: something else uses the machine.")


def throughput_result(result: ThroughputResult) -> None:
    """Requests a second and latencies of every load."""
    rows = [
        (
            load.arm,
            str(load.in_flight),
            f"{load.requests_per_s:.0f}",
            _us(load.latency.median_us),
            _us(load.latency.p99_us),
        )
        for load in result.loads
    ]
    _table(("arm", "in flight", "requests/s", "latency us", "p99 us"), rows)
    best = result.best
    print(
        f"\n{result.model} on {result.environment['device']} ({result.device}), {result.policy}: "
        f"most requests with {best.in_flight} in flight, {best.arm}."
    )


def run_outputs(outputs: Mapping[str, Any]) -> None:
    """Shape, type and range of every output."""
    import numpy as np

    for name, value in outputs.items():
        if isinstance(value, list):
            print(f"{name}  sequence of {len(value)}")
            continue
        array = np.asarray(value)
        spread = ""
        if array.size and np.issubdtype(array.dtype, np.number):
            with np.errstate(all="ignore"):  # infinities of both signs have no mean
                spread = f"  min {array.min():.6g}  mean {array.mean():.6g}  max {array.max():.6g}"
        print(f"{name}  {array.dtype.name}{list(array.shape)}{spread}")


def differences(found: Sequence[Difference]) -> None:
    """How far each output is apart."""
    rows = [
        (d.output, f"{d.max_absolute:.3g}", f"{d.relative:.3g}", "yes" if d.is_within else "NO")
        for d in found
    ]
    _table(("output", "max absolute", "relative (norm)", "within"), rows)


def inspection(found: Inspection) -> None:
    """Streams, segments, and what stays on the host."""
    details = found.annotation.details
    print(
        f"policy {details.get('policy', 'unknown')}, "
        f"{_form(found.annotation.variant, details.get('rewrite', 'none'))}, "
        f"{len(found.plan.segments)} segments, ",
        end="",
    )
    copies = f", {len(found.plan.copies)} copies between devices" if found.plan.copies else ""
    print(f"{found.plan.wait_count} event waits, {len(found.plan.pieces)} piece(s){copies}")
    times = [details.get("measured_us"), details.get("sequential_us")]
    if all(isinstance(time, float) for time in times):
        print(f"measured {times[0]:.1f} us, one stream {times[1]:.1f} us", end="")
        names = details.get("device_names")
        kinds = dict.fromkeys(map(str, names.values())) if isinstance(names, dict) else {}
        print(f", on {', '.join(kinds)}" if kinds else "")
    rows = []
    for placement in sorted({node.placement for node in found.nodes}):
        nodes = [node for node in found.nodes if node.placement == placement]
        busy = sum(node.duration_us or 0.0 for node in nodes)
        segments = len({node.segment for node in nodes})
        rows.append((str(placement), str(len(nodes)), str(segments), f"{busy:.1f}"))
    print()
    _table(("device/stream", "operators", "segments", "sum of solo us"), rows)
    if found.annotation.host_reasons:
        print("\nNot captured:")
        for name, reason in found.annotation.host_reasons.items():
            print(f"  {name}: {reason}")


def diagnosis(found: Diagnosis) -> None:
    """Libraries, GPUs, and whether the CUDA provider loads."""
    for name, value in found.environment.items():
        print(f"{name}: {value}")
    for device in found.devices:
        gibibytes = device["memory_nbytes"] / 2**30
        print(
            f"{device['id']}: {device['name']}, {gibibytes:.0f} GiB, "
            f"{device['multiprocessor_count']} multiprocessors, compute "
            f"{device['compute_capability']}"
        )
    for pair, reaches in found.peer_access.items():
        print(f"peer access {pair}: {'yes' if reaches else 'no'}")
    print(f"CUDA provider: {found.cuda_provider}")
    ready = "a GPU schedule" if found.is_gpu_ready else "CPU schedules only"
    print(f"This machine can make and run {ready}.")
