"""Programs that compile in the background while something else runs."""

import time
from collections.abc import Hashable
from concurrent.futures import ThreadPoolExecutor

import jax


class Programs:
    """Compiles one program after another, in the order of `add`.

    XLA times kernels on the device while it compiles, so several programs at once would wait for each other.
    """

    def __init__(self):
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._compiling, self._began = {}, None

    def add(self, name: Hashable, lowered: jax.stages.Lowered):
        self._began = self._began or time.perf_counter()

        def compile():
            lowered.compile()
            return time.perf_counter()

        self._compiling[name] = self._pool.submit(compile)

    def __contains__(self, name: Hashable) -> bool:
        """Whether the program was added, and nobody has waited for it."""
        return name in self._compiling

    def wait(self, name: Hashable) -> float | None:
        """Waits for the program, if it was added. Returns how many seconds after the first `add` it was ready, or None."""
        return self._compiling.pop(name).result() - self._began if name in self else None

    def close(self):
        """Compiles nothing more, and waits for nothing."""
        self._pool.shutdown(wait=False, cancel_futures=True)
