"""The directory of a run, runs/<name>. It is made and checked before anything is computed, and read again to resume."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from checkpoints import Checkpoints, Stopped
from flax import nnx
from tensorboardX import SummaryWriter

from snnfuse import training

NOT_COMPARED = (
    "name",
    "out",
    "resume",
    "stop_at",
    "mesh",
    "workers",
)  # keys that may differ between a run and its resumption


class Run:
    """Its configuration (`flat`, as `config.flatten` makes it), its metrics and its checkpoints."""

    def __init__(self, flat: dict[str, Any]):
        self.path = _open_directory(flat)
        self._jsonl = None
        self._checkpoints = Checkpoints(self.path / "checkpoints")

    def start(self, *objects) -> int:
        """The step to begin at. If there is a whole checkpoint, the objects are restored from the last one."""
        arrays, step = training.to_arrays(*objects), 0
        if (found := self._checkpoints.restore(arrays, training.settings(*objects))) is not None:
            step = found[0]
            training.from_arrays(found[1], *objects)
        kept = [json.dumps(row) + "\n" for row in self.rows() if row["step"] <= step]
        (self.path / "metrics.new").write_text("".join(kept))
        (self.path / "metrics.new").replace(self.path / "metrics.jsonl")
        self._jsonl = open(self.path / "metrics.jsonl", "a")
        self._tensorboard = SummaryWriter(str(self.path / "tensorboard"), purge_step=step + 1)
        return step

    def check_space(self, *objects):
        """Raises Stopped if the disk is too full for checkpoints of the objects, which may hold shapes in place of arrays."""
        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(nnx.state(objects)))
        need = 4 * size + 2**24  # two checkpoints, a third being written, the rest
        free = shutil.disk_usage(self.path).free
        if free < need:
            raise Stopped(
                f"{self.path} needs {need / 2**20:.0f} MiB for checkpoints; its disk has {free / 2**20:.0f} MiB free"
            )

    def rows(self) -> list[dict]:
        path = self.path / "metrics.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []  # a line without its end was cut off
        return [json.loads(line) for line in lines]

    def record(self, rows: list[tuple[int, dict]]):
        """Writes (step, metrics) of some steps: a row each to metrics.jsonl, and their means to TensorBoard, which is slow."""
        self._jsonl.write("".join(json.dumps({"step": step, **metrics}) + "\n" for step, metrics in rows))
        self._jsonl.flush()
        for name, value in _means(rows).items():
            self._tensorboard.add_scalar(name.replace("eval_", "eval/"), value, rows[-1][0])

    def save(self, step: int, *objects):
        self._checkpoints.save(step, training.to_arrays(*objects), training.settings(*objects))

    def saved(self) -> int | None:
        return self._checkpoints.last()

    def close(self):
        self._checkpoints.close()
        if self._jsonl:
            self._jsonl.close()
            self._tensorboard.close()


class Meter:
    """Metrics of steps that may still be running. They are fetched and written together, while the device works on later steps."""

    def __init__(self, run: Run):
        self.run = run
        self.restart()

    def restart(self):
        self.pending, self.since = [], time.perf_counter()

    def add(self, step: int, metrics: dict, batch: int):
        """The metrics of a call whose first step is `step`, of `batch` samples each: scalars, or arrays with one value a step."""
        self.pending.append((step, metrics))
        self.batch = batch

    def write(self, running: int = 0) -> dict[str, str]:
        """Write what is pending but the last `running` calls, whose steps may still run. Returns what the progress bar shows.

        Raises Stopped at the first value that is not finite.
        """
        ready = max(0, len(self.pending) - running)
        calls, self.pending = jax.device_get(self.pending[:ready]), self.pending[ready:]
        now = time.perf_counter()
        rows = []
        for first, metrics in calls:
            columns = {name: np.atleast_1d(values).tolist() for name, values in metrics.items()}
            steps = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
            rows += enumerate(steps, first)
        if not rows:
            return {}
        speed, self.since = self.batch * len(rows) / (now - self.since), now
        rows = [(step, {**row, "samples_per_s": speed}) for step, row in rows]
        for i, (step, row) in enumerate(rows):
            if bad := [f"{name} is {value}" for name, value in row.items() if not np.isfinite(value)]:
                if i:
                    self.run.record(rows[:i])
                raise Stopped(
                    f"{', '.join(bad)} at step {step}: stopped. Try a smaller --learning_rate or --clip; "
                    f"{self.run.path} has its metrics, and its last checkpoint is of step {self.run.saved()}"
                )
        self.run.record(rows)
        mean = _means(rows)
        return {"loss": f"{mean['loss']:.3f}", "acc": f"{mean['accuracy']:.1%}", "samples/s": f"{speed:.0f}"}


def _means(rows):
    return {name: float(np.mean([row[name] for _, row in rows])) for name in rows[0][1]}


def keep_compiled() -> None:
    """Let JAX keep compiled programs in the user's cache directory: the next run starts faster."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "snnfuse" / "compiled"
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(cache))


def _open_directory(flat):
    path = Path(flat["out"]) / flat["name"]
    saved = path / "config.json"
    if flat["resume"]:
        if not saved.exists():
            raise Stopped(f"--resume, but there is no run in {path}: {saved} does not exist")
        before = json.loads(saved.read_text())
        for key in sorted(before.keys() | flat.keys()):
            if key not in NOT_COMPARED and before.get(key) != flat.get(key):
                raise Stopped(
                    f"{path} was made with {key}={before.get(key)}; got {key}={flat.get(key)}. "
                    f"Resume it as it was, or start another with --name"
                )
        _check_writable(path)
        return path
    n = 1
    while path.exists():
        n += 1
        path = Path(flat["out"]) / f"{flat['name']}-{n}"
    _check_writable(path)
    (path / "config.json").write_text(json.dumps(flat, indent=1) + "\n")
    return path


def _check_writable(path):
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".probe"
        probe.write_bytes(bytes(4096))
        probe.unlink()
    except OSError as e:
        raise Stopped(f"cannot write to {path} (see --out, --name): {e.strerror or e}") from e
