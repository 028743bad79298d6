"""How much memory cuBLAS keeps for each of its handles, of which every session has one.

cuBLAS reads a variable when a process makes its first handle, and never again; so it is set until
then, and taken back before other libraries or child processes see it.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
_FULL, _SMALL = ":32768:1", ":16:8"

_kept: str | None = None
"""What cuBLAS is told in this process; None until it matters."""
_is_set_here = False
_is_read = False
"""Whether cuBLAS has looked: what is set from then on changes nothing."""


def keep_blas_workspace(kind: Literal["small", "full"] | None = None) -> None:
    """Say how much memory each cuBLAS handle keeps; the first say in a process counts.

    By default it is 64 MiB on recent GPUs. Half of that is as fast, and what multiplies no
    matrices is as fast with next to none. It can't be chosen by session; a value that the user
    has set is left alone.

    Args:
        kind: What the model at hand wants; None if it may be any, who does not insist.
    """
    global _kept, _is_set_here
    if _kept is None:
        _kept = os.environ.get(_VARIABLE, _SMALL if kind == "small" else _FULL)
    elif kind == "full" and _kept == _SMALL:
        warnings.warn(
            "A model without matrix products was loaded first, so this one gets little cuBLAS "
            f"workspace and may be slower; load it first, or set {_VARIABLE}={_FULL}.",
            RuntimeWarning,
            stacklevel=2,
        )
    if not _is_read and _VARIABLE not in os.environ:
        _is_set_here = True
        os.environ[_VARIABLE] = _kept


def release_blas_variable() -> None:
    """Take the variable back: a session has run, so cuBLAS has read it."""
    global _is_read
    _is_read = True
    _take_back()


@contextmanager
def blas_variable_only_if_needed() -> Iterator[None]:
    """Take the variable back if what it was set for within fails.

    It stays where it was set before: a session that was loaded then may not have run yet. cuBLAS
    may have read it or not, so the first say still counts, and the next load sets it again.
    """
    was_set = _is_set_here
    try:
        yield
    except BaseException:
        if not was_set:
            _take_back()
        raise


def _take_back() -> None:
    global _is_set_here
    if _is_set_here:
        _is_set_here = False
        os.environ.pop(_VARIABLE, None)
