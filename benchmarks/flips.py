"""How many spikes differ from scan's, over 134 million slots: on continuous inputs, and on inputs on a 0.1 grid.

python benchmarks/flips.py [--implementations pallas,mosaic,triton]        seconds on a GPU; rows go to results/flips.jsonl

A spike can differ only where a membrane comes within a rounding of the threshold. On a grid it often should be the
threshold exactly, and then the last bit decides: a compiler may round decay * v + x once (a fused multiply-add) or twice.
On an H100, JAX 0.11.2: none differs, of either input, by any of the three.
"""

import argparse

import jax
import jax.numpy as jnp
from measure import record

import snnfuse as sf

T, M = 32, 2**22


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--implementations", default="pallas,mosaic,triton")
    implementations = parser.parse_args().implementations.split(",")
    continuous = jax.random.normal(jax.random.key(0), (T, M)) + 0.3
    inputs = {"continuous": continuous, "grid of 0.1": jnp.round(continuous, 1)}
    for name, xs in inputs.items():
        run = jax.jit(
            lambda xs, i: sf.unroll(sf.LIF(), sf.LIFParams(0.7), None, xs, implementation=i, out_dtype=jnp.bool_)[0],
            static_argnums=1,
        )
        want = run(xs, "scan")
        for implementation in implementations:
            row = dict(case=name, implementation=implementation, slots=T * M)
            try:
                row |= dict(status="ok", differ=int((run(xs, implementation) != want).sum()))
            except NotImplementedError as e:
                row |= dict(status=str(e)[:200])
            record("flips", **row, firing_rate=float(want.mean()))


if __name__ == "__main__":
    main()
