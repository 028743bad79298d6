"""The gate tries the same examples every time, so that it fails for a change and not by chance.

`pytest --hypothesis-profile explore` tries others.
"""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("gate", derandomize=True)
settings.register_profile("explore", print_blob=True)
settings.load_profile("gate")
