"""For all tests: a script that starts them in the background leaves SIGINT ignored, which processes that tests start would inherit."""

from __future__ import annotations

import signal

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
