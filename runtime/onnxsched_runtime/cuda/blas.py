"""How much memory cuBLAS keeps for each of its handles, of which every session has one.

cuBLAS reads a variable when a process makes its first handle, and never again; so it is set until
then, and taken back before other libraries or child processes see it.
"""

from __future__ import annotations

import os
import warnings
from typing import Literal

_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
_FULL, _SMALL = ":32768:1", ":16:8"

_kept: str | None = None
"""What cuBLAS is told in this process; None until it matters."""
_is_set_here = False


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
        wanted = _SMALL if kind == "small" else _FULL
        _is_set_here = _VARIABLE not in os.environ
        _kept = os.environ.setdefault(_VARIABLE, wanted)
    elif kind == "full" and _kept == _SMALL:
        warnings.warn(
            "A model without matrix products was loaded first, so this one gets little cuBLAS "
            f"workspace and may be slower; load it first, or set {_VARIABLE}={_FULL}.",
            RuntimeWarning,
            stacklevel=2,
        )


def release_blas_variable() -> None:
    """Take the variable back: a session has run, so cuBLAS has read it."""
    global _is_set_here
    if _is_set_here:
        _is_set_here = False
        os.environ.pop(_VARIABLE, None)
