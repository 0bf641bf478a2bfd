"""The block sizes that `autotune` found, in a file of the user's: $XDG_CACHE_HOME/snnfuse/blocks.json, or ~/.cache."""

import functools
import json
import os
import pathlib
import tempfile

from snnfuse.ops.device import kind as device_kind
from snnfuse.ops.problem import Problem


def path() -> pathlib.Path:
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "snnfuse" / "blocks.json"


def key(problem: Problem, kernels: str) -> str:
    """Everything that the best sizes depend on: the device, the neuron, the shapes and the dtypes."""
    names = [getattr(d, "name", repr(d)) for d in (*problem.x_dtypes, *problem.out_dtypes)]
    state = "constant state" if problem.initial is not None else "state"
    parts = device_kind(), kernels, problem.step.neuron, f"T={problem.T}", f"M={problem.M}", names, state
    return " | ".join(map(str, (*parts, f"{len(problem.param_shapes)} params")))


@functools.cache
def read() -> dict[str, list]:
    try:
        return json.loads(path().read_text())
    except FileNotFoundError:
        return {}
    except ValueError as e:
        raise ValueError(f"{path()}, the block sizes kept by snnfuse.autotune, is not JSON: {e}; delete it") from e


def write(key: str, blocks: tuple) -> None:
    read.cache_clear()
    found = read() | {key: blocks}
    path().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path().parent, delete=False) as f:  # a reader never sees half a file
        json.dump(found, f, indent=1)
    os.replace(f.name, path())
    read.cache_clear()
