"""The checkpoints of a run, by Orbax. Each one stores a digest of its content, so a damaged one is never restored.

Orbax writes to another folder and renames it, so a kill at any moment leaves the older checkpoints whole. But it does not
notice a flipped byte; the digest does.
"""

import hashlib
import logging
import re
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax import Array

from snnfuse import training

DIGEST = "digest"


class Stopped(RuntimeError):
    """Training cannot go on, or was interrupted; the message says what to do."""


class NotSaved(Stopped):
    """A checkpoint could not be written, or none can be read. The message names the last one that exists."""


class Checkpoints:
    """The last `keep` checkpoints under `path`, each {name: array}."""

    def __init__(self, path: Path, keep: int = 2):
        self.path = Path(path).absolute()
        self._keep = keep
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs tracebacks of what is raised here anyway
        self._manager = self._open()

    def _open(self):
        return ocp.CheckpointManager(self.path, options=ocp.CheckpointManagerOptions(max_to_keep=self._keep))

    def save(self, step: int, arrays: dict[str, Array], settings: dict[str, str] | None = None):
        """Starts to write. An error is raised here, by the next `save`, or by `last`."""
        if self._manager.latest_step() != step:
            content = {**arrays, DIGEST: _digest(arrays)}
            items = dict(arrays=ocp.args.StandardSave(content), settings=ocp.args.JsonSave(settings or {}))
            self._or_not_saved(lambda: self._manager.save(step, args=ocp.args.Composite(**items)))

    def last(self) -> int | None:
        """Waits until all checkpoints are written; returns the step of the last one."""
        self._or_not_saved(self._manager.wait_until_finished)
        return self._manager.latest_step()

    def restore(
        self, like: dict[str, Array], settings: dict[str, str] | None = None
    ) -> tuple[int, dict[str, Array]] | None:
        """(step, arrays) of the last whole checkpoint, in the shapes and shardings of `like`; None if there is no checkpoint.

        Raises Stopped if the network of the checkpoint had other `settings` (`training.settings`).

        Later, damaged ones are then moved aside with a message. Raises NotSaved if all are damaged, and moves none.
        """
        damaged = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                arrays, saved = self._restore(step, like)
            except Exception as e:  # Orbax has no exception of its own for a checkpoint that it cannot read
                damaged.append((step, _cause(e)))
                continue
            for bad, cause in damaged:  # only now: if none can be read, the fault may not be theirs
                print(f"checkpoint of step {bad} is damaged ({cause}): {self._set_aside(bad)}", file=sys.stderr)
            try:
                training.compare_settings(saved, settings or {})
            except ValueError as e:
                raise Stopped(f"{self.path}: {e}") from e
            return step, arrays
        if damaged:
            faults = "; ".join(f"step {step}: {cause}" for step, cause in damaged)
            raise NotSaved(f"none of the checkpoints in {self.path} is whole, and all are left there: {faults}")
        return None

    def close(self):
        self._or_not_saved(self._manager.close)

    def _restore(self, step, like):
        content = {**like, DIGEST: np.zeros(32, np.uint8)}
        items = dict(arrays=ocp.args.StandardRestore(content), settings=ocp.args.JsonRestore())
        found = self._manager.restore(step, args=ocp.args.Composite(**items))
        arrays = found["arrays"]
        if not np.array_equal(arrays.pop(DIGEST), _digest(arrays)):
            raise ValueError("its arrays do not have the digest that was saved with them")
        return arrays, found["settings"]

    def _set_aside(self, step):
        if jax.process_index() == 0:
            aside = self.path.with_name(f"damaged-checkpoint-{step}")
            shutil.rmtree(aside, ignore_errors=True)
            (self.path / str(step)).rename(aside)
        self._manager.reload()
        return "using the one before it; the damaged one is kept beside the checkpoints"

    def _or_not_saved(self, f):
        try:
            return f()
        except Exception as e:
            steps = sorted(int(p.name) for p in self.path.iterdir() if p.name.isdecimal()) if self.path.exists() else []
            kept = f"the last checkpoint in {self.path} is of step {steps[-1]}" if steps else "there is none before it"
            raise NotSaved(f"cannot write a checkpoint ({_cause(e)}); {kept}") from e


def _digest(arrays):
    """A digest of names, types and bytes. Of an array that is cut over several hosts only the name counts: no host has it all."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        x = arrays[name]
        digest.update(f"{name} {x.dtype} {x.shape}".encode())
        if not isinstance(x, jax.Array) or x.is_fully_addressable:
            digest.update(np.ascontiguousarray(x).tobytes())
        elif x.is_fully_replicated:
            digest.update(np.ascontiguousarray(x.addressable_data(0)).tobytes())
    return np.frombuffer(digest.digest(), np.uint8)


def _cause(e):
    """The end of an exception's first line: these exceptions give the cause there, between paths and [name='...']."""
    text = re.split(r" \[\w+=", (str(e).strip() or "no message").splitlines()[0])[0]
    return f"{type(e).__name__}: {text if len(text) < 160 else '...' + text[-160:]}"
