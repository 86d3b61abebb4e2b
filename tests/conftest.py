"""How much property tests try.

A small, fixed sample in `make test`; a large, random one in `make test-all`.
"""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("quick", deadline=None, derandomize=True, max_examples=40)
settings.register_profile("full", deadline=None, max_examples=200)
settings.load_profile("quick")  # `--hypothesis-profile=full` takes its place
