"""Other operators that compute the same: rewrites of the portable model, chosen by measurement.

Merging siblings makes fewer and larger operators, but a longer way through the model for the
smallest of them: whether it pays depends on the schedule, so it is tried with schedules. Bands of
rows are more and smaller operators, which only several devices can gain from. These also gain by
computing an operator twice rather than copying its result: which ones, a schedule tells.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from onnxsched.aligning import aligned, find_passages
from onnxsched.bands import banded
from onnxsched.drafting import Draft, assembled
from onnxsched.duplication import duplicated
from onnxsched.folding import find_stems, folded
from onnxsched.graph_view import GraphView
from onnxsched.loading import NO_REWRITE, Model
from onnxsched.merging import merge
from onnxsched.offsets import deferred, find_deferrals
from onnxsched.recomputing import Duplicate
from onnxsched.regions import find_bands
from onnxsched.siblings import find_siblings
from onnxsched.transposing import find_products, transposed
from onnxsched_runtime.device import Device
from onnxsched_runtime.variant import Variant

MERGES: Mapping[str, Mapping[str, bool]] = {
    "merge": {},
    "merge-inner": {"is_inner": True},
    "merge-padded": {"is_padded": True},
}
"""Which siblings each rewrite merges, as `find_siblings` takes it."""
_TWICE = "twice"
_LATE = "late-bias"
_TRANSPOSED = "transposed"
_ALIGNED = "aligned"
_FOLDED = "folded"
_STEPS: Mapping[str, Callable[[Model], Model]] = {
    _LATE: deferred,
    _TRANSPOSED: transposed,
    _ALIGNED: aligned,
    _FOLDED: folded,
}
_LEAST = 0.05
"""Of all operators: fewer biases that can wait, or products, are not worth a trial."""


@dataclass(frozen=True)
class Rewrites:
    """Names of what may make a model faster, the most promising first."""

    alike: tuple[str, ...] = ()
    """What leaves operators side by side as they were: the best in one stream is best in any."""
    merged: tuple[str, ...] = ()
    """What makes others of them, so that only a schedule tells whether it pays."""


def possible_rewrites(model: Model, device: Device, variant: Variant) -> Rewrites:
    """The rewrites that change a model.

    Alike are those that store matrices transposed, or add channels for the kernels of channels
    last, or make channels of an image's pixels. The others merge operators, each in another way;
    or where the variant adds the biases of convolutions by kernels of their own, let them wait for
    sums.
    """
    if device.kind == "cpu" or model.host_reasons:
        return Rewrites()
    view = GraphView(model)
    found: dict[tuple[tuple[str, ...], ...], str] = {}
    for name, scope in MERGES.items():
        groups = find_siblings(view, **scope)
        names = tuple(tuple(sibling.node.name for sibling in group) for group in groups)
        if names:
            found.setdefault(names, name)
    merged = tuple(found.values())
    if not variant.fuse_conv_bias and len(find_deferrals(view)[1]) >= _least(model):
        merged = (_LATE, *(joined(name, _LATE) for name in merged[:1]), *merged)
    return Rewrites(_alike(view, variant), merged)


def _alike(view: GraphView, variant: Variant) -> tuple[str, ...]:
    if variant.layout == "nhwc":
        found = [_ALIGNED] if find_passages(view) else []
        if find_stems(view):
            found.append(joined(found[0] if found else NO_REWRITE, _FOLDED))
        return tuple(found)
    return (_TRANSPOSED,) if len(find_products(view)) >= _least(view.model) else ()


def _least(model: Model) -> float:
    return _LEAST * len(model.proto.graph.node)


def joined(first: str, second: str) -> str:
    """The rewrite that is one after another."""
    return second if first == NO_REWRITE else f"{first}+{second}"


def possible_bands(model: Model, device_count: int) -> tuple[str, ...]:
    """The rewrites that cut a model into a band of rows for each device, e.g. `bands-2`."""
    if device_count < 2 or model.host_reasons:
        return ()
    return tuple(f"{scheme}-{device_count}" for scheme in find_bands(model, device_count))


def twice(rewrite: str) -> str:
    """The rewrite that computes operators twice after another, e.g. `bands-2+twice`."""
    return joined(rewrite, _TWICE)


def rewritten(model: Model, rewrite: str, duplicates: Sequence[Duplicate] = ()) -> Model:
    """The model merged, in bands or with copies: equal within rounding, the same in- and outputs.

    Only operators that every ONNX Runtime has are added, and the same model is always rewritten
    to the same nodes and names. O(nodes, edges and bytes of weights).

    Args:
        model: A portable model that is not rewritten.
        rewrite: A name in `MERGES`, a scheme of `find_bands` and a count of bands, or `none`;
            `late-bias`, `transposed`, `aligned` or `folded`; or several, one after the other, with
            a `+` between them.
        duplicates: What is computed twice then, as `recompute` finds it.

    Raises:
        KeyError: There is no such rewrite, or no such operator to be copied.
    """
    if rewrite == NO_REWRITE:
        return model
    for step in rewrite.split("+"):
        model = _step(model, step, duplicates)
    return replace(model, rewrite=rewrite)


def _step(model: Model, step: str, duplicates: Sequence[Duplicate]) -> Model:
    if step == _TWICE:
        return duplicated(model, duplicates)
    if step in _STEPS:
        return _STEPS[step](model)
    scheme, _, count = step.rpartition("-")
    if count.isdecimal():
        region = find_bands(model, int(count))[scheme]
        return banded(model, region.groups, region.count)
    draft = Draft(GraphView(model))
    for group in find_siblings(draft.view, **MERGES[step]):
        merge(draft, group)
    return assembled(draft, step)
