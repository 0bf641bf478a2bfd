"""How everything is timed here, and how a result becomes a row.

Inputs are random, never zeros. A time is wall clock around calls that are dispatched one after another and waited for
once, divided by their number: the device never idles between them unless the host cannot keep up. Median and quartiles
of several repeats. The copy rate, (bytes read + bytes written) / time of x + 1 on a large array, is measured in the same
process, and speeds are given as ratios to it.

`call_ms` is a jitted function as a user calls it; `ms` one of several in one program, so that the device need not wait
for the host: what a layer costs inside a network.
"""

import datetime
import json
import os
import pathlib
import platform
import subprocess
import time

import jax
import jax.numpy as jnp
import numpy as np

ON_GPU = jax.default_backend() == "gpu"
RESULTS = pathlib.Path(__file__).parent / "results"


def time_ms(f, *args, repeats=7, seconds=0.05):
    """(median, lower quartile, upper quartile) of the milliseconds of f(*args), compiled already by a first call."""
    jax.block_until_ready(f(*args))
    start = time.perf_counter()
    jax.block_until_ready(f(*args))
    calls = max(3, int(seconds / (time.perf_counter() - start)))
    samples = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            out = f(*args)
        jax.block_until_ready(out)
        samples.append((time.perf_counter() - start) / calls * 1e3)
    return tuple(float(q) for q in np.quantile(samples, (0.5, 0.25, 0.75)))


def device_ms(f, sets):
    """Milliseconds of one f(*args) within a program that runs it on each of `sets`: (median, quartiles).

    The sets differ, so that nothing is computed once for all, and no result of one is in a cache for the next.
    """
    run = jax.jit(lambda sets: [f(*args) for args in sets])
    return tuple(t / len(sets) for t in time_ms(run, sets))


def peak_mb(compiled):
    """What a compiled program holds on one device at most: arguments, results and temporaries."""
    sizes = compiled.memory_analysis()
    held = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return (held + sizes.temp_size_in_bytes) / 1e6


def copy_rate(nbytes=2**30):
    """Bytes a second of x + 1, read and written."""
    x = jax.random.normal(jax.random.key(0), (nbytes // 4,), jnp.float32)
    return 2 * x.nbytes / (time_ms(jax.jit(lambda x: x + 1), x)[0] * 1e-3)


def fwd_bwd(f):
    """A jitted (args, cotangents) -> (outputs, gradients) of f, for cotangents given from outside."""

    @jax.jit
    def run(args, cotangents):
        out, vjp = jax.vjp(f, *args)
        return out, vjp(cotangents)

    return run


def normal_like(tree, seed=1):
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return treedef.unflatten([jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)])


def record(name, **row):
    """Append one row to results/<name>.jsonl, with where, when and from which code it came; and print it."""
    git = lambda *a: subprocess.run(["git", *a], capture_output=True, text=True, cwd=RESULTS.parent).stdout.strip()
    commit = os.environ.get("SNNFUSE_COMMIT") or git("rev-parse", "--short", "HEAD")  # a copied tree has no .git
    dirty = bool(git("status", "--porcelain", "--untracked-files=no", "--", "../snnfuse", ".", ":!results"))
    device = jax.devices()[0]
    row |= dict(
        device=device.device_kind,
        jax=jax.__version__,
        python=platform.python_version(),
        date=datetime.date.today().isoformat(),
        commit=commit or "unknown",
        dirty=dirty,
    )
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / f"{name}.jsonl", "a") as f:
        f.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)
