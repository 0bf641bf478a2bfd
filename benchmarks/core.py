"""The fused kernels against `lax.scan` and against the copy rate: forward and backward, time and peak memory.

python benchmarks/core.py        about five minutes on an H100; rows go to results/core.jsonl (without a GPU: core_cpu.jsonl)
python benchmarks/core.py --only compile        a minute of it; the rows of the other part stay

A case is checked before it is timed: spikes equal to scan's, gradients to rounding. `of_copy_rate` counts 5 tensors
moved (x and s; x, ds and dx) at the rate that x + 1 reaches in the same process; `over_scan` is scan's time over ours.

Of `compile` nothing runs: it is the time from a Python function to a program, once the process has compiled one of its
kind; `first_s` is that one, of a single step, and the imports with it.
"""

import argparse
import json
import time
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from measure import ON_GPU, RESULTS, copy_rate, device_ms, fwd_bwd, peak_mb, record, time_ms

import snnfuse as sf
from snnfuse.ops import triton

f32, bf16 = jnp.float32, jnp.bfloat16
ROWS = "core" if ON_GPU else "core_cpu"  # without a GPU: the smallest cases, a check and no result


class ThetaParams(NamedTuple):
    decay: jax.Array
    gain: jax.Array


class ThetaState(NamedTuple):
    v: jax.Array
    trace: jax.Array


@dataclass(frozen=True)
class Resonator:
    """A neuron that exists only in this file: a damped oscillator that spikes, and inhibits itself by its spike trace."""

    def init_state(self, shape):
        return ThetaState(jnp.zeros(shape, f32), jnp.zeros(shape, f32))

    def step(self, params, state, x):
        u = params.decay * state.v - 0.3 * state.trace + params.gain * x
        s = sf.spike(u - 1.0, sf.FastSigmoid())
        return ThetaState(u * (1 - s), params.decay * state.trace + u * 0.1 + s), s


NEURONS = {
    "lif": (sf.LIF(), sf.LIFParams()),
    "lif learned tau": (sf.LIF(), sf.LIFParams(f32(0.5))),
    "adaptive lif": (sf.AdaptiveLIF(), sf.AdaptiveLIFParams(*map(f32, (0.9, 0.95, 0.2, 1.0)))),
    "izhikevich": (sf.Izhikevich(), sf.IzhikevichParams()),
    "own neuron": (Resonator(), ThetaParams(f32(0.8), f32(1.0))),
}
CASES = [  # the first four by every implementation, the others by scan and "pallas"
    ("lif", 32, 2**20, f32),
    ("lif", 32, 2**20, bf16),
    ("lif", 256, 2**17, f32),
    ("lif", 4096, 4096, f32),
    ("lif", 500, 2**13, f32),
    ("lif", 8, 2**22, f32),
    ("lif", 8, 2**22, bf16),
    ("lif", 32, 2**24, f32),
    ("lif", 32, 2**24, bf16),
    ("lif learned tau", 32, 2**20, f32),
    ("adaptive lif", 32, 2**20, f32),
    ("izhikevich", 32, 2**20, f32),
    ("own neuron", 32, 2**20, f32),
]
EVERYONE = 4
COMPILED = [(16, 2**12), (256, 2**12), (4096, 2**12), (500, 2**13)]


def compare(got, want):
    """The largest gradient error against its scale, and the number of spikes that differ."""
    flips = int((got[0] != want[0]).sum())
    error = 0.0
    for a, b in zip(jax.tree.leaves(got[1]), jax.tree.leaves(want[1]), strict=True):
        a, b = (jnp.asarray(g, f32) for g in (a, b))
        error = max(error, float(jnp.abs(a - b).max() / jnp.abs(b).max()))
    return flips, error


def bench(name, T, M, dtype, rate, implementations):
    neuron, params = NEURONS[name]
    learned = {k: v for k, v in params._asdict().items() if isinstance(v, jax.Array)}
    scale = 20.0 if name == "izhikevich" else 1.0
    num = max(
        1, min(8, 2**31 // (T * M * jnp.dtype(dtype).itemsize))
    )  # at most 2 GiB of inputs, and as much of cotangents
    draw = lambda seed: jax.random.normal(jax.random.key(seed), (T, M), f32)
    sets = [((scale * (draw(2 * i) + 0.3)).astype(dtype), draw(2 * i + 1).astype(dtype)) for i in range(num)]
    scan = None
    for implementation in implementations:
        row = dict(case=name, T=T, M=M, dtype=jnp.dtype(dtype).name, implementation=implementation)

        def spikes(learned, xs, implementation=implementation):
            return sf.unroll(neuron, params._replace(**learned), None, xs, implementation=implementation)[0]

        try:
            result, measured = run(spikes, learned, sets, rate)
            row |= measured
            if implementation == "scan":
                scan = result, row["ms"]
            elif scan:
                flips, error = compare(result, scan[0])
                row |= dict(over_scan=scan[1] / row["ms"], spikes_that_differ=flips, gradient_error=error)
                if error > (1e-3 if dtype == f32 else 2e-2):
                    row |= dict(status=f"wrong: gradient error {error:.2g}", ms=None)
        except Exception as e:  # a failure is a row
            row |= dict(status=repr(e)[:300])
        record(ROWS, **row)


def timed_compile(f, *args):
    """(f compiled, seconds), with nothing left of what was compiled before."""
    jax.clear_caches()
    triton.kernel.cache_clear()  # jax-triton keeps what it compiles, by these
    start = time.perf_counter()
    compiled = f.lower(*args).compile()
    return compiled, time.perf_counter() - start


def bench_compile(implementation):
    def seconds(T, M):
        xs = jax.ShapeDtypeStruct((T, M), f32)
        spikes = lambda xs: sf.unroll(sf.LIF(), sf.LIFParams(), None, xs, implementation=implementation)[0]
        return timed_compile(fwd_bwd(spikes), (xs,), xs)[1]

    for i, (T, M) in enumerate(COMPILED):
        row = dict(case="compile", T=T, M=M, dtype="float32", implementation=implementation)
        try:
            first = dict(first_s=seconds(1, M)) if i == 0 else {}
            row |= dict(status="ok", compile_s=seconds(T, M), **first)
        except Exception as e:
            row |= dict(status=repr(e)[:300])
        record(ROWS, **row)


def run(spikes, learned, sets, rate):
    """((spikes, gradients) of the first set, the measured part of a row); the loss sees the spikes alone."""
    xs, cotangent = sets[0]
    compiled, compile_s = timed_compile(fwd_bwd(spikes), (learned, xs), cotangent)
    result = compiled((learned, xs), cotangent)
    ms, low, high = device_ms(fwd_bwd(spikes), [((learned, xs), cotangent) for xs, cotangent in sets])
    return result, dict(
        status="ok",
        ms=ms,
        quartiles=(low, high),
        call_ms=time_ms(compiled, (learned, xs), cotangent)[0],
        forward_ms=device_ms(spikes, [(learned, xs) for xs, _ in sets])[0],
        of_copy_rate=5 * xs.nbytes / rate / (ms * 1e-3),
        firing_rate=float(jnp.mean(result[0].astype(f32))),
        peak_units=peak_mb(compiled) * 1e6 / xs.nbytes,
        compile_s=compile_s,
    )


def forget(parts):
    """Drops the rows of the parts that will run: what stays is of one run each; earlier ones are in the history."""
    file = RESULTS / f"{ROWS}.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    part = lambda row: "compile" if row["case"] == "compile" else "speed"
    file.write_text("".join(line for line in lines if part(json.loads(line)) not in parts))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--implementations", default="scan,pallas,mosaic,triton")
    parser.add_argument("--cases", type=int, default=len(CASES), help="the first so many of them")
    parser.add_argument("--only", default="compile,speed", help="the parts to run")
    args = parser.parse_args()
    implementations, parts = args.implementations.split(","), args.only.split(",")
    if unknown := set(parts) - {"compile", "speed"}:
        parser.error(f"--only must name compile, speed or both; got {', '.join(unknown)}")
    forget(parts)
    if "compile" in parts:  # before anything else is imported
        for implementation in implementations:
            bench_compile(implementation)
    if "speed" not in parts:
        return
    rate = float(np.median([copy_rate() for _ in range(3)]))
    record(ROWS, case="copy", status="ok", bytes_per_s=rate)
    for i, case in enumerate(CASES[: args.cases]):
        if not ON_GPU and case[1] * case[2] > 2**22:
            continue
        known = (name for name in implementations if i < EVERYONE or name in ("scan", "pallas"))
        bench(*case, rate, known)


if __name__ == "__main__":
    main()
