"""Signs of life: each rank gives its own, watches those of others, and ends with them."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace

from onnxsched_runtime.errors import RankError, reason_of
from onnxsched_runtime.group.judge import RankState, Sighting, judge
from onnxsched_runtime.group.peers import Peers

_BEATS_IN_TIMEOUT = 20
_LONGEST_BEAT_S = 0.5
_POLL_S = 0.01


class Monitor:
    """A thread that tells the others about this rank and judges them.

    Whoever finds a rank that died, hangs or failed writes a sentence into the store, and then only
    drops its connections; so that whoever loses a connection finds the sentence there, or else
    knows that the other side has died.
    """

    def __init__(self, peers: Peers) -> None:
        """Start the thread."""
        self._peers = peers
        self._state = RankState()
        self._busy_count = 0
        self._waits: list[int] = []
        self._lock = threading.Lock()
        self._telling = threading.Lock()
        """One message after the other, but streams don't wait for the store."""
        self._ended = threading.Event()
        self.cancels: Callable[[], None] = lambda: None
        """Ends all that this rank waits for; called once, when all ranks must end."""
        self.verdict: str | None = None
        """Why all ranks must end; None while all is well."""
        self.failed = threading.Event()
        """Set once there is a verdict."""
        self._beat = 0
        self._thread = threading.Thread(target=self._watch, daemon=True, name="onnxsched-monitor")
        self._tell()
        self._thread.start()

    def require_all_well(self) -> None:
        """Do nothing while it is.

        Raises:
            RankError: All ranks must end.
        """
        if self.verdict is not None:
            raise RankError(self.verdict)

    def wait_until_ready(self) -> None:
        """Tell that this rank has opened its sessions, and wait for the others to.

        Raises:
            RankError: A rank died meanwhile.
        """
        self._change(replace(self._state, is_ready=True))
        self._wait_for(lambda state: state.is_ready)
        self.require_all_well()

    def _wait_for(self, condition: Callable[[RankState], bool]) -> None:
        """Wait until it holds for all, or there is a verdict."""
        while not self.failed.wait(_POLL_S):
            told = [self._peers.heard("state", rank) for rank in range(self._peers.count)]
            if all(message and condition(_parsed(message)) for message in told):
                return

    @contextmanager
    def running(self) -> Iterator[None]:
        """A run; whatever goes wrong in it ends all ranks."""
        self.require_all_well()
        with self._lock:
            self._state = replace(self._state, run=self._state.run + 1, is_running=True)
        try:
            yield
            self.require_all_well()  # else what was cancelled may look like a result
        except RankError:
            raise
        except BaseException as error:
            self.fail_with(error)
            raise
        finally:
            with self._lock:
                self._state = replace(self._state, is_running=False)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """A step of one stream.

        Raises:
            RankError: It failed, and ends all ranks.
        """
        with self._lock:
            self._busy_count += 1
        try:
            yield
        except Exception as error:
            raise RankError(self.fail_with(error)) from error
        finally:
            with self._lock:
                self._busy_count -= 1
                self._state = replace(self._state, step=self._state.step + 1)

    @contextmanager
    def waiting_for(self, rank: int) -> Iterator[None]:
        """A step of one stream that ends when another rank has done something.

        Raises:
            RankError: The connection to it broke.
        """
        with self._lock:
            self._waits.append(rank)
        try:
            yield
        except RuntimeError as error:
            sentence = self.fail(f"Rank {rank} has died or left while others were running.")
            raise RankError(sentence) from error
        finally:
            with self._lock:
                self._waits.remove(rank)
                self._state = replace(self._state, step=self._state.step + 1)

    def fail_with(self, error: BaseException) -> str:
        """End all ranks for what went wrong on this one; returns as `fail`."""
        reason = reason_of(error)
        is_whole = isinstance(error, RankError)  # a sentence that names a rank already
        return self.fail(reason if is_whole else f"Rank {self._peers.rank} failed: {reason}")

    def fail(self, sentence: str) -> str:
        """End all ranks; returns why, which is what the first of them said."""
        with self._lock:
            verdict = self.verdict
        if verdict is not None:
            return verdict
        try:
            sentence = self._peers.fail(sentence)
        except RankError as error:
            sentence = str(error)
        self._end(sentence)
        return self.verdict or sentence

    def close(self) -> None:
        """Wait until no one needs this rank any more, and say that it is gone."""
        run = self._state.run
        with contextlib.suppress(RankError):  # the store is gone, with who waited
            self._tell()
            self._wait_for(
                lambda s: s.is_closed or s.run > run or (s.run == run and not s.is_running)
            )
            self._change(replace(self._state, is_closed=True))
        self._ended.set()
        self._thread.join(self._peers.timeout_s)
        self.cancels = lambda: None  # it holds the links, and these hold the monitor

    def _change(self, state: RankState) -> None:
        with self._lock:
            self._state = state
        self._tell()

    def _end(self, sentence: str) -> None:
        with self._lock:
            if self.verdict is not None:
                return
            self.verdict = sentence
        self.cancels()
        self.failed.set()

    def _tell(self) -> None:
        with self._telling:
            self._beat += 1
            with self._lock:
                waits = tuple(sorted(set(self._waits)))
                state = replace(self._state, is_busy=self._busy_count > 0, waits_for=waits)
            self._peers.tell("state", json.dumps([self._beat, asdict(state)]))

    def _watch(self) -> None:
        beat_s = min(_LONGEST_BEAT_S, self._peers.timeout_s / _BEATS_IN_TIMEOUT)
        watch = _Watch(self._peers)
        try:
            while not self.failed.is_set() and not self._ended.wait(beat_s):
                self._tell()
                if (sentence := self._peers.failure or watch.look()) is not None:
                    self.fail(sentence)
        except RankError as error:
            self._end(str(error))


class _Watch:
    """What one rank has seen of all ranks."""

    def __init__(self, peers: Peers) -> None:
        self._peers = peers
        self._states: dict[int, RankState] = {}
        self._messages: dict[int, str] = {}
        self._heard_at_s = [time.monotonic()] * peers.count
        self._changed_at_s = [time.monotonic()] * peers.count
        self._begun_at_s = time.monotonic()

    def look(self) -> str | None:
        """Look once; returns who is to blame, if anyone is."""
        now_s = time.monotonic()
        for rank in range(self._peers.count):
            message = self._peers.heard("state", rank)
            if message is not None and message != self._messages.get(rank):
                self._messages[rank] = message
                self._heard_at_s[rank] = now_s
                self._see(rank, _parsed(message), now_s)
        sightings = [
            Sighting(
                self._states.get(rank, RankState()),
                now_s - self._heard_at_s[rank],
                now_s - self._changed_at_s[rank],
            )
            for rank in range(self._peers.count)
        ]
        return judge(sightings, now_s - self._begun_at_s, self._peers.timeout_s)

    def _see(self, rank: int, state: RankState, now_s: float) -> None:
        before = self._states.get(rank)
        if state != before:
            self._changed_at_s[rank] = now_s
            self._states[rank] = state
        if rank == 0 and (before is None or before.run != state.run):
            self._begun_at_s = now_s


def _parsed(message: str) -> RankState:
    fields = json.loads(message)[1]
    return RankState(**{**fields, "waits_for": tuple(fields["waits_for"])})
