"""Who is blamed when ranks wait for each other."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxsched_runtime.group.judge import RankState, Sighting, judge

IDLE = RankState(is_ready=True, run=3)
BUSY = RankState(is_ready=True, run=3, is_running=True, is_busy=True)


def waiting(rank: int, run: int = 3) -> RankState:
    return RankState(is_ready=True, run=run, is_running=True, waits_for=(rank,))


def judged(*states: RankState, unchanged_s: float = 99.0, begun_s: float = 99.0) -> str | None:
    """The judgment on ranks that all give signs of life."""
    return judge([Sighting(state, 0.5, unchanged_s) for state in states], begun_s, 20.0)


states = st.builds(
    RankState,
    is_ready=st.booleans(),
    run=st.integers(0, 3),
    is_running=st.booleans(),
    is_busy=st.booleans(),
    waits_for=st.sampled_from([(), (0,), (1,)]),
)
brief = st.floats(0, 19.9)


@given(ranks=st.lists(st.builds(Sighting, states, brief, brief), min_size=1, max_size=4))
def test_nobody_is_blamed_before_time(ranks: list[Sighting]) -> None:
    assert judge(ranks, 99.0, 20.0) is None


@given(ranks=st.lists(states, min_size=1, max_size=4), silent=st.integers(0, 3))
def test_silence_is_blamed_whatever_was_said(ranks: list[RankState], silent: int) -> None:
    silent %= len(ranks)
    seen = [Sighting(s, 20.0 if r == silent else 0.1, 99.0) for r, s in enumerate(ranks)]
    sentence = judge(seen, 99.0, 20.0)
    assert sentence == f"Rank {silent} has given no sign of life for 20 s; it died or hangs."


def test_who_closed_its_session_may_be_silent() -> None:
    closed = RankState(is_ready=True, is_closed=True, run=3)
    assert judge([Sighting(IDLE, 0.1, 0.1), Sighting(closed, 99.0, 99.0)], 99.0, 20.0) is None


@pytest.mark.parametrize("others", [waiting(0, run=4), IDLE])
def test_rank_0_may_take_its_time_between_runs(others: RankState) -> None:
    assert judged(IDLE, others, others) is None


def test_loading_may_take_long() -> None:
    assert judged(RankState(is_ready=True), RankState()) is None


def test_who_computes_too_long_is_blamed_and_not_who_waits() -> None:
    sentence = "Rank 2 has not got on in run 3 for 20 s; it hangs."
    assert judged(waiting(1), waiting(2), BUSY) == sentence
    assert judged(IDLE, waiting(2), BUSY) == sentence


def test_who_does_not_join_is_blamed() -> None:
    late = RankState(is_ready=True, run=2)
    assert judged(waiting(1), late) == "Rank 1 has not joined run 3 for 20 s; it hangs."
    assert judged(waiting(1), late, begun_s=1.0) is None


def test_waiting_for_who_gets_on_is_no_fault() -> None:
    seen = [Sighting(waiting(1), 0.1, 99.0), Sighting(BUSY, 0.1, 5.0)]
    assert judge(seen, 99.0, 20.0) is None


def test_when_all_wait_the_network_is_suspected() -> None:
    sentence = judged(waiting(1), waiting(0))
    assert sentence is not None
    assert sentence.startswith("Rank 0 has waited for rank 1 for 20 s, and all others wait too")
