"""Ctrl-C: outside of training one line and status 130, in training a checkpoint after the step.

It imports next to nothing, so it works while other packages are imported.
"""

import os
import signal
import sys
from contextlib import contextmanager

MESSAGE = "error: interrupted outside of training; checkpoints that were finished are kept"


def quietly() -> None:
    """From now on Ctrl-C ends the process. Training itself puts another handler in place, which saves a checkpoint."""
    signal.signal(signal.SIGINT, _leave)


def _leave(*_):
    sys.stdout.flush()
    print(f"\n{MESSAGE}", file=sys.stderr, flush=True)
    os._exit(130)  # an exception would come out of an import as a traceback


@contextmanager
def noted():
    """A function that says whether Ctrl-C or SIGTERM came: the loop then ends between two steps, with a checkpoint."""
    came = []
    try:
        before = {s: signal.signal(s, lambda *_: came.append(True)) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals are not ours
        before = {}
    try:
        yield lambda: bool(came)
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
