"""How much memory cuBLAS keeps for each of its handles, of which every session has one."""

from __future__ import annotations

import os
import warnings
from typing import Literal

_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
_FULL, _SMALL = ":32768:1", ":16:8"


def keep_blas_workspace(kind: Literal["small", "full"] | None = None) -> None:
    """Say how much memory each cuBLAS handle keeps; the first say in a process counts.

    By default it is 64 MiB on recent GPUs. Half of that is as fast, and what multiplies no
    matrices is as fast with next to none. cuBLAS reads the variable once, so it can't be chosen
    by session; a value that the user has set is left alone.

    Args:
        kind: What the model at hand wants; None if it may be any, who does not insist.
    """
    kept = os.environ.setdefault(_VARIABLE, _SMALL if kind == "small" else _FULL)
    if kind == "full" and kept == _SMALL:
        warnings.warn(
            "A model without matrix products was loaded first, so this one gets little cuBLAS "
            f"workspace and may be slower; load it first, or set {_VARIABLE}={_FULL}.",
            RuntimeWarning,
            stacklevel=2,
        )
