"""GPUs of one kind share the operators that are to be measured."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from queue import SimpleQueue
from typing import Self

import onnx

from onnxsched.loading import Model
from onnxsched.profile import OperatorProfile
from onnxsched.profiling.isolation import ProfilingWorker
from onnxsched_runtime import cuda
from onnxsched_runtime.device import Device

_Outcome = tuple[str, OperatorProfile] | BaseException | None
"""What a worker has measured, why it ends, or that it is done."""


class ProfilingWorkers:
    """A worker on each GPU that is like the first; what one measures holds for all of them."""

    def __init__(self, devices: Sequence[Device]) -> None:
        """Start them; other GPUs of the machine measure nothing.

        Raises:
            DeviceError: A device is not there.
        """
        for device in devices:
            cuda.require_device(device)
        kind = cuda.device_properties(devices[0]) if len(devices) > 1 else None
        alike = [d for d in devices[1:] if cuda.device_properties(d) == kind]
        self._workers = {device: ProfilingWorker() for device in (devices[0], *alike)}
        self._threads: list[threading.Thread] = []
        self._is_ending = False

    def measure(
        self,
        model: Model,
        device: Device,
        nodes: Sequence[onnx.NodeProto],
        custom_ops: tuple[str, ...],
    ) -> Iterator[tuple[str, OperatorProfile]]:
        """As `ProfilingWorker.measure`, in whatever order they are done.

        Args:
            model: The model.
            device: One of those that share.
            nodes: The operators.
            custom_ops: Libraries of custom operators.

        Raises:
            ModelError: ORT refuses an operator on its own, or ends before any is captured.
        """
        outcomes: SimpleQueue[_Outcome] = SimpleQueue()
        shares = {
            own: nodes[number :: len(self._workers)] for number, own in enumerate(self._workers)
        }
        self._is_ending = False
        self._threads = threads = [
            threading.Thread(
                target=self._measure_share, args=(model, own, share, custom_ops, outcomes),
                daemon=True,
            )
            for own, share in shares.items()
            if share
        ]  # fmt: skip
        for thread in threads:
            thread.start()
        running = len(threads)
        while running:
            outcome = outcomes.get()
            if isinstance(outcome, BaseException):
                self.close()  # which ends the others
                raise outcome
            if outcome is None:
                running -= 1
            else:
                yield outcome

    def _measure_share(
        self,
        model: Model,
        device: Device,
        nodes: Sequence[onnx.NodeProto],
        custom_ops: tuple[str, ...],
        outcomes: SimpleQueue[_Outcome],
    ) -> None:
        try:
            for measured in self._workers[device].measure(model, device, nodes, custom_ops):
                outcomes.put(measured)
                if self._is_ending:  # else another process would take the place of one that ended
                    return
        except BaseException as error:  # raised where it is waited for
            outcomes.put(error)
        else:
            outcomes.put(None)

    def close(self) -> None:
        """End the processes, once no thread reads from them any more."""
        self._is_ending = True
        while alive := [thread for thread in self._threads if thread.is_alive()]:
            for worker in self._workers.values():
                worker.end()
            alive[0].join(0.01)
        for worker in self._workers.values():
            worker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


Profiler = ProfilingWorker | ProfilingWorkers
"""What measures operators on GPUs."""
