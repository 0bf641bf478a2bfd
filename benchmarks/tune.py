"""Sweeps lanes, warps and chunk length of the fused kernels over shapes: where the numbers in `ops/blocks.py` come from.

python benchmarks/tune.py [--seconds 240]        several minutes on a GPU; rows go to results/tune.jsonl
"""

import argparse
import itertools
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
from measure import copy_rate, fwd_bwd, normal_like, record, time_ms

import snnfuse as sf
from snnfuse.ops import fused
from snnfuse.ops.blocks import Blocks
from snnfuse.ops.check import check_call
from snnfuse.ops.pallas_triton import PallasKernels

NEURONS = {
    "lif": (sf.LIF(), sf.LIFParams(0.5, 1.0)),
    "lif_learned": (sf.LIF(), sf.LIFParams(jnp.float32(0.5), 1.0)),
    "adaptive": (sf.AdaptiveLIF(), sf.AdaptiveLIFParams(*map(jnp.float32, (0.9, 0.95, 0.2, 1.0)))),
}
f32, bf16 = jnp.float32, jnp.bfloat16
SHAPES = [
    ("lif", 32, 2**20, f32),
    ("lif", 32, 2**20, bf16),
    ("lif", 500, 8192, f32),
    ("lif", 256, 2**17, f32),
    ("adaptive", 32, 2**20, f32),
    ("lif", 8, 2**22, f32),
    ("lif", 8, 2**22, bf16),
    ("lif", 32, 2**24, f32),
    ("lif", 32, 2**24, bf16),
    ("lif", 4096, 4096, f32),
    ("lif", 32, 2**16, bf16),
    ("lif_learned", 32, 2**20, f32),
]


def candidates(T, M, dtype):
    chunks = [k for k in (4, 8, 16, 32) if k <= T] if T % 32 == 0 or T < 32 else [10, 20, 25]
    wide = [
        (lanes, warps) for lanes in (128, 256, 512, 1024) for warps in (1, 2, 4, 8) if 2 <= lanes // 32 // warps <= 8
    ]
    narrow = [(32, 1), (64, 1), (64, 2), (128, 2), (128, 4)]
    ahead = (False, True) if jnp.dtype(dtype).itemsize == 2 else (False,)
    return [Blocks(*lw, k, a) for lw, k, a in itertools.product(wide if M > 2**16 else narrow, chunks, ahead)]


def main(seconds):
    end = time.monotonic() + seconds
    rate = copy_rate()
    record("tune", case="copy", bytes_per_s=rate)
    for name, T, M, dtype in SHAPES:
        if time.monotonic() > end:
            record("tune", case=name, T=T, M=M, dtype=jnp.dtype(dtype).name, status="out of time")
            continue
        neuron, params = NEURONS[name]
        xs = (jax.random.normal(jax.random.key(0), (T, M), f32) + 0.3).astype(dtype)
        state = neuron.init_state((M,))
        problem, leaves, state, xs = check_call(neuron, params, state, xs, None)
        cotangents = ((jax.random.normal(jax.random.key(1), (T, M), f32).astype(dtype),), normal_like(state))

        def build(blocks, problem=problem, args=(leaves, state, xs), cotangents=cotangents):
            f = lambda *a: fused.run(fused.KernelPasses(PallasKernels(problem, blocks)), *a)
            try:
                return blocks, fwd_bwd(f).lower(args, cotangents).compile()
            except Exception as e:  # a candidate that does not compile is a row too
                return blocks, e

        rows = []
        with ThreadPoolExecutor(12) as pool:
            for blocks, f in pool.map(build, candidates(T, M, dtype)):
                if isinstance(f, Exception):
                    record(
                        "tune", case=name, T=T, M=M, dtype=jnp.dtype(dtype).name, blocks=blocks, status=repr(f)[:200]
                    )
                    continue
                rows.append((blocks, f))
        timed = []
        for blocks, f in rows:
            ms = time_ms(f, (leaves, state, xs), cotangents, repeats=3, seconds=0.02)[0]
            floor = 5 * T * M * jnp.dtype(dtype).itemsize / rate * 1e3
            timed.append((ms, blocks, floor / ms))
        timed.sort()
        for ms, blocks, ratio in (*timed[:4], timed[-1]):
            record("tune", case=name, T=T, M=M, dtype=jnp.dtype(dtype).name, blocks=blocks, ms=ms, of_copy_rate=ratio)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=240)
    main(parser.parse_args().seconds)
