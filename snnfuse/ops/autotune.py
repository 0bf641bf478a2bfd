"""Times block sizes for one call and stores the fastest for later calls."""

import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from snnfuse.core.neuron import Neuron, PyTree
from snnfuse.ops import fused, implementations, tuning
from snnfuse.ops.check import check_call


def autotune(
    neuron: Neuron,
    params: PyTree,
    state: PyTree | None,
    xs: PyTree,
    *,
    implementation: str | None = None,
    out_dtype=None,
    seconds: float = 60.0,
) -> list[tuple[float, tuple]]:
    """Time forward + backward of `unroll` on these arguments with different block sizes, and store the fastest.

    It takes the arguments of `unroll`. The result goes to a file in the user's cache directory (`snnfuse.ops.tuning`);
    later calls with this neuron, these shapes and dtypes on this device use it, and `explain` shows it. Block sizes
    change no result. Sizes that need more memory than the device has are skipped. It stops after `seconds`, and returns
    [(milliseconds, blocks)], the fastest first.

    Raises: what `unroll` raises; NotImplementedError for scan, which has no blocks.
    """
    problem, params, state, xs = check_call(neuron, params, state, xs, out_dtype)
    name = implementations.choose(problem, implementation)
    chosen = implementations.get(name)
    if not (candidates := chosen.candidates(problem)):
        raise NotImplementedError(f"implementation {name!r} has no block sizes to tune")
    end = time.monotonic() + seconds
    timed = []
    for blocks in (chosen.blocks(problem), *candidates):
        try:
            timed.append((_milliseconds(chosen.passes(problem, blocks), params, state, xs), blocks))
        except Exception as e:
            if not timed:  # the blocks that run without tuning must run
                raise
            if "memory" not in str(e) and "resource" not in str(e).lower():
                raise
        if time.monotonic() > end:
            break
    timed.sort(key=lambda t: t[0])
    tuning.write(tuning.key(problem, type(timed[0][1]).__name__), timed[0][1])
    return timed


@partial(jax.jit, static_argnums=0)
def _forward_backward(passes, params, state, xs, cotangents):
    outs, vjp = jax.vjp(lambda *args: fused.run(passes, *args)[0], params, state, xs)
    return outs, vjp(cotangents)


def _milliseconds(passes, params, state, xs, calls=5):
    run = partial(_forward_backward, passes)
    outs = jax.eval_shape(lambda *args: fused.run(passes, *args)[0], params, state, xs)
    cotangents = tuple(_random(o) for o in outs)
    jax.block_until_ready(run(params, state, xs, cotangents))
    start = time.perf_counter()
    results = [run(params, state, xs, cotangents) for _ in range(calls)]
    jax.block_until_ready(results)
    return (time.perf_counter() - start) / calls * 1e3


def _random(out):
    if not jnp.issubdtype(out.dtype, jnp.floating):
        return np.zeros(out.shape, jax.dtypes.float0)  # the cotangent of an integer, for JAX
    return jax.random.normal(jax.random.key(0), out.shape, out.dtype)
