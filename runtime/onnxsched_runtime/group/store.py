"""The store of a process group: it answers in time, or counts as dead."""

from __future__ import annotations

import threading
from queue import Empty, SimpleQueue
from typing import Any

from onnxsched_runtime.errors import RankError

SILENCE = (
    "Rank 0, or the launcher that keeps the store of the process group, has died: the store does "
    "not answer."
)
_Answers = SimpleQueue[Any]


class Store:
    """A store that a thread of its own asks: where its host is silent, that waits without an end.

    Once an answer is late, none is waited for any more.
    """

    def __init__(self, native: Any, timeout_s: float) -> None:
        """Ask `native`, a store of torch.distributed, and wait so long for each answer."""
        self._native, self._timeout_s = native, timeout_s
        self._is_silent = False
        self._questions: SimpleQueue[tuple[str, tuple[Any, ...], _Answers] | None] = SimpleQueue()
        threading.Thread(target=self._answer, daemon=True, name="onnxsched-store").start()

    def ask(self, question: str, *arguments: Any) -> Any:
        """What a method of the store returns.

        Raises:
            RankError: It does not answer, here and in what follows.
        """
        answers: _Answers = SimpleQueue()
        if not self._is_silent:
            self._questions.put((question, arguments, answers))
        try:
            answer = answers.get(timeout=0 if self._is_silent else self._timeout_s)
        except Empty:
            self._is_silent = True
            raise RankError(SILENCE) from None
        if isinstance(answer, RuntimeError):
            raise RankError(SILENCE) from answer
        return answer

    def _answer(self) -> None:
        while (asked := self._questions.get()) is not None:
            question, arguments, answers = asked
            try:
                answers.put(getattr(self._native, question)(*arguments))
            except RuntimeError as error:
                answers.put(error)
        self._native = None  # given up here: garbage is collected while others wait for the store

    def close(self) -> None:
        """End the thread, once it has its last answer."""
        self._is_silent = True
        self._questions.put(None)
