"""The directory of a run, runs/<name>. It is made and checked before anything is computed, and read again to resume."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from checkpoints import Checkpoints, Stopped
from tensorboardX import SummaryWriter

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

    def start(self, state) -> tuple[int, Any]:
        """(the step to begin at, the state there), from the last whole checkpoint if there is one."""
        _check_space(self.path, state)
        step = 0
        if (found := self._checkpoints.restore(_flat(state))) is not None:
            step, state = found[0], from_flat(state, found[1])
        kept = [json.dumps(row) + "\n" for row in self.rows() if row["step"] <= step]
        (self.path / "metrics.new").write_text("".join(kept))
        (self.path / "metrics.new").replace(self.path / "metrics.jsonl")
        self._jsonl = open(self.path / "metrics.jsonl", "a")
        self._tensorboard = SummaryWriter(str(self.path / "tensorboard"), purge_step=step + 1)
        return step, state

    def rows(self) -> list[dict]:
        path = self.path / "metrics.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []  # a line without its end was cut off
        return [json.loads(line) for line in lines]

    def record(self, step: int, metrics: dict):
        self._jsonl.write(json.dumps({"step": step, **metrics}) + "\n")
        self._jsonl.flush()
        for name, value in metrics.items():
            self._tensorboard.add_scalar(name.replace("eval_", "eval/"), value, step)

    def save(self, step: int, state):
        self._checkpoints.save(step, _flat(state))

    def saved(self) -> int | None:
        return self._checkpoints.last()

    def close(self):
        self._checkpoints.close()
        if self._jsonl:
            self._jsonl.close()
            self._tensorboard.close()


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


def _check_space(path, state):
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    need, free = 4 * size + 2**24, shutil.disk_usage(path).free  # two checkpoints, a third being written, the rest
    if free < need:
        raise Stopped(f"{path} needs {need / 2**20:.0f} MiB for checkpoints; its disk has {free / 2**20:.0f} MiB free")


def _flat(state):
    """{path: array} of an nnx state, as a checkpoint stores it. Random keys are stored as their bits."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): _bits(leaf) for path, leaf in leaves}


def from_flat(state, flat):
    def restored(path, leaf):
        value = flat[jax.tree_util.keystr(path)]
        return jax.random.wrap_key_data(value, impl=jax.random.key_impl(leaf)) if _is_key(leaf) else value

    return jax.tree_util.tree_map_with_path(restored, state)


def _bits(leaf):
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _is_key(leaf):
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
