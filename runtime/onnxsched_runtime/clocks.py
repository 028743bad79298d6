"""Vector clocks: what is known to be finished, by stream. Pure.

Positions in the launch order do not tell what happens before what, since streams run at the same
time; the order of each stream and the events between them do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from onnxsched_runtime.device import Placement
from onnxsched_runtime.errors import PlanError

Clock = dict[Placement, int]
"""For each stream, up to which of its ticks everything is finished."""


@dataclass
class Clocks:
    """How far each stream of a piece knows every other stream to have come."""

    starts: Mapping[Placement, Clock] = field(default_factory=dict)
    """What some streams know when the piece starts."""
    common: Mapping[Placement, int] = field(default_factory=dict)
    """What all the others do."""
    streams: dict[Placement, Clock] = field(default_factory=dict)
    """What each stream knows by now."""
    _events: dict[int, Clock] = field(default_factory=dict)

    def of(self, placement: Placement) -> Clock:
        """The clock of a stream."""
        if placement not in self.streams:
            self.streams[placement] = dict(self.starts.get(placement, self.common))
        return self.streams[placement]

    def run(self, placement: Placement) -> int:
        """Run something on a stream; returns its tick there."""
        clock = self.of(placement)
        clock[placement] = clock.get(placement, 0) + 1
        return clock[placement]

    def record(self, event: int, placement: Placement) -> None:
        """Record an event.

        Raises:
            PlanError: It was recorded before.
        """
        if event in self._events:
            raise PlanError(f"Event {event} is recorded twice.")
        self._events[event] = dict(self.of(placement))

    def wait(self, event: int, placement: Placement) -> None:
        """Let a stream wait for an event.

        Raises:
            PlanError: It was not recorded yet.
        """
        if event not in self._events:
            raise PlanError(f"Event {event} is waited for before it is recorded.")
        clock = self.of(placement)
        for stream, tick in self._events[event].items():
            clock[stream] = max(clock.get(stream, 0), tick)
