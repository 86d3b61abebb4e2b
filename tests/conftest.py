"""How much property tests try, and that tests can be interrupted.

A small, fixed sample in `make test`; a large, random one in `make test-all`.
"""

from __future__ import annotations

import signal

from hypothesis import settings

settings.register_profile("quick", deadline=None, derandomize=True, max_examples=40)
settings.register_profile("full", deadline=None, max_examples=200)
settings.load_profile("quick")  # `--hypothesis-profile=full` takes its place

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # So it is for what a shell starts in the background, and for all that this starts in turn:
    # tests that interrupt a command would wait for ever.
    signal.signal(signal.SIGINT, signal.default_int_handler)
