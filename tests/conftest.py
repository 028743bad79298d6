"""The gate tries the same examples every time, so that it fails for a change and not by chance.

Fewer than Hypothesis would by itself, so that it ends in time on a slow machine as well;
`pytest --hypothesis-profile explore` tries others, and more.
"""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("gate", derandomize=True, max_examples=60)
settings.register_profile("explore", print_blob=True)
settings.load_profile("gate")
