"""How fast, and how exact, are the fused kernels beside `lax.scan`? How does their speed compare with copying memory?

    python benchmarks/core.py                     forward and backward of one layer; five minutes on an H100
    python benchmarks/core.py --only compile      only the time to compile; a minute
    python benchmarks/core.py flips               how many of 134 million spikes differ from those of scan; seconds
    python benchmarks/core.py tune                which block sizes are fastest: the numbers in snnfuse/ops/blocks.py
    python benchmarks/core.py contract            the contract tests of every implementation; ten minutes
    python benchmarks/core.py choice --jobs 12    which implementation is fastest, over T, lanes, dtype and neuron; ten minutes

Rows go to the file in results/ that has the name of the question. A layer is checked before it is timed: its gradients must be
those of scan (not in `choice`). `of_copy_rate` compares it with x + 1: five tensors (read x, write s; read x and ds, write dx) divided by the
time, as a share of the bytes per second that x + 1 moves. `over_scan` is scan's time divided by ours; `peak_units` is
memory in units of xs. `compile` is the time from a Python function to a program; `first_s` is that of the first program of
a process, a single step, with the imports that it causes.

Inputs on a grid of 0.1 often make a membrane exactly equal to the threshold, and then the last bit decides whether it spikes.

Blocks are [lanes, warps, chunk, prefetch], for "mosaic" [rows, chunk, stages].
"""

import itertools
import os
import re
import statistics
import subprocess
import sys
import tempfile
from functools import cache
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
from neurons import NEURONS, PAPERS, SCALE
from runner import HERE, Case, job, main, question, rows, split
from with_jax import bf16, compiled, device_ms, device_time, f32, forward_backward, largest_error, repeated, time_ms

import snnfuse as sf
from snnfuse.core.compose import Affine
from snnfuse.ops import implementations, triton, tuning

CASES = [  # the first ten run by every implementation, the others by scan and "pallas"
    ("lif", 4, 2**23, f32),
    ("lif", 4, 2**23, bf16),
    ("lif learned", 4, 2**23, f32),
    ("lif learned", 4, 2**23, bf16),
    ("normalised lif", 4, 2**23, f32),
    ("normalised lif", 4, 2**23, bf16),
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
    *((name, 100, 2**17, dtype) for name in PAPERS for dtype in (f32, bf16)),
]
EVERYONE = 10
CHOSEN = "lif", "lif learned", "constant adaptive lif", "adaptive lif"  # one state and two, params constant and learned
COMPILED = [(16, 2**12), (256, 2**12), (4096, 2**12), (500, 2**13)]


def shapes(args):
    return [(name, 4, 256, dtype) for name, _, _, dtype in (CASES[3], CASES[5], CASES[18])] if args.tiny else CASES


@question("core", implementations=("scan,pallas,mosaic,triton", "which of them; scan first, to compare with"))
def core(args):
    names = ["scan", "interpret"] if args.tiny else split(args.implementations)
    for name in names:  # before the others, so that `first_s` is the first
        for i, (T, M) in enumerate([(4, 256)] if args.tiny else COMPILED):
            key = dict(case="compile", T=T, M=M, dtype="float32", implementation=name)
            yield Case(key, compile_time, (name, T, M, i == 0))
    yield Case(dict(case="copy"), lambda: dict(bytes_per_s=rate(args.tiny)))
    for i, (name, T, M, dtype) in enumerate(shapes(args)):
        for implementation in names if i < EVERYONE else [n for n in names if n in ("scan", "pallas", "interpret")]:
            key = dict(case=name, T=T, M=M, dtype=jnp.dtype(dtype).name, implementation=implementation)
            yield Case(key, layer, (name, T, M, dtype, implementation, args.tiny), job(args, i))


def grid():
    """(neuron, T, lanes, dtype, implementations) of the question `choice`: up to 2^27 numbers in xs.

    Everywhere "pallas" and "triton". Scan where it comes close: up to 4 steps, and on few lanes. "mosaic" where it does: on
    many lanes. Odd numbers of lanes have no aligned rows.
    """
    for T in (1, 2, 4, 6, 8, 10, 16, 32, 100, 500, 1000):
        for exponent in (12, 15, 18, 20, 22, 25):
            names = ("pallas", "triton")
            names += ("scan",) if T <= 4 or exponent == 12 and T in (8, 32, 1000) else ()
            names += ("mosaic",) if exponent >= 20 and T in (1, 2, 4, 8, 32) else ()
            for name, dtype in itertools.product(CHOSEN, (f32, bf16)):
                if T * 2**exponent <= 2**27:
                    yield name, T, 2**exponent, dtype, names
    for T, M, dtype in itertools.product((4, 32), (2**20 + 1, 2**20 + 2), (f32, bf16)):
        yield "lif", T, M, dtype, ("pallas", "triton", "mosaic", "scan")
    for name, T, M in (("lif", 500, 2**15 + 1), ("constant adaptive lif", 500, 2**15 + 1), ("lif", 1000, 2**17)):
        yield name, T, M, f32, ("pallas", "triton")


@question("choice")
def choice(args):
    cells = [("lif learned", 4, 256, f32, ("scan", "interpret"))] if args.tiny else grid()
    cells = [(*cell, implementation) for *cell, names in cells for implementation in names]
    for i, (name, T, M, dtype, implementation) in enumerate(cells):
        where = job(args, i % 2 if T * M > 2**24 else i)  # few processes hold much memory
        key = dict(case=name, T=T, M=M, dtype=jnp.dtype(dtype).name, implementation=implementation)
        yield Case(key, milliseconds, (name, T, M, dtype, implementation), where)


class Cell(NamedTuple):
    """One cell of the table `choice`: a neuron, a dtype, T steps and M lanes.

    `ms` has the milliseconds of each implementation. `chosen` is the one that None picks; it takes `over` times as long as the fastest.
    """

    case: str
    dtype: str
    T: int
    M: int
    ms: dict[str, float]
    chosen: str
    over: float

    @property
    def fastest(self):
        return min(self.ms, key=self.ms.get)


def cells() -> list[Cell]:
    """The cells in which None's choice was measured, of the GPU of the last row."""
    found, every = {}, [row for row in rows("choice") if row["status"] == "ok"]
    for row in every:
        if row["device"] == every[-1]["device"]:
            key = row["case"], row["dtype"], row["T"], row["M"]
            found.setdefault(key, {})[row["implementation"]] = row["ms"]
    made = []
    for (case, dtype, T, M), ms in sorted(found.items()):
        neuron, params = NEURONS[case]
        arrays = [leaf for leaf in jax.tree.leaves(params) if isinstance(leaf, jax.Array)]
        states = len(jax.tree.leaves(neuron.init_state((1,))))
        problem = SimpleNamespace(T=T, M=M, param_shapes=[leaf.shape for leaf in arrays], num_state=states)
        chosen = implementations.preference(problem)[0]
        if chosen in ms and len(ms) > 1:
            made.append(Cell(case, dtype, T, M, ms, chosen, ms[chosen] / min(ms.values())))
    return made


@question("flips", implementations=("pallas,mosaic,triton", "which of them"))
def flips(args):
    for name in ("continuous", "grid of 0.1"):
        for implementation in ["interpret"] if args.tiny else split(args.implementations):
            shape = (4, 256) if args.tiny else (32, 2**22)
            yield Case(dict(case=name, implementation=implementation), differing, (name, implementation, shape))


@question("tune", implementations=("pallas", "pallas, mosaic or triton"), seconds=(20.0, "for each shape of tune"))
def tune(args):
    for name, T, M, dtype in shapes(args):
        for implementation in ["interpret"] if args.tiny else split(args.implementations):
            key = dict(case=name, T=T, M=M, dtype=jnp.dtype(dtype).name, implementation=implementation)
            yield Case(key, fastest_blocks, (name, T, M, dtype, implementation, args.seconds, args.tiny))


@question("contract", implementations=("pallas,mosaic,triton", "which of them"))
def contract(args):
    tests = "tests/test_imports.py" if args.tiny else "tests/test_ops_contract.py"
    for name in ["planted"] if args.tiny else split(args.implementations):
        key = dict(case="contract", implementation=name, tests=f"{tests} -k {name}")
        yield Case(key, run_tests, (tests, name))


@cache
def rate(tiny):
    """Bytes read and written per second by x + 1."""
    x, add = jax.random.normal(jax.random.key(0), (2**18 if tiny else 2**28,), f32), jax.jit(lambda x: x + 1)
    return 2 * x.nbytes / (statistics.median(time_ms(add, x)[0] for _ in range(3)) * 1e-3)


def inputs(name, T, M, dtype, learned=(), most=2**31):
    """A function that draws (learned, xs) and cotangents from a seed, and how often to call it: 8 times at most, and up
    to `most` bytes of inputs."""
    scale = SCALE.get(name, 1.0)

    @jax.jit
    def draw(seed):
        normal = lambda key: jax.random.normal(key, (T, M), f32)
        x, cotangent = map(normal, jax.random.split(jax.random.key(seed)))
        return (learned, (scale * (x + 0.3)).astype(dtype)), cotangent.astype(dtype)

    return draw, max(1, min(8, most // (T * M * jnp.dtype(dtype).itemsize)))


def arranged(name, xs):
    """xs as the neuron takes it: with its channels in the last axis, and in a tuple for `Affine`."""
    neuron, params = NEURONS[name]
    channels = max((leaf.size for leaf in jax.tree.leaves(params) if isinstance(leaf, jax.Array)), default=1)
    xs = xs.reshape(len(xs), -1, channels) if channels > 1 else xs
    return (xs,) if isinstance(neuron, Affine) else xs


def spikes_of(name, implementation):
    """A function of (the arrays among the params, xs), and those arrays."""
    neuron, params = NEURONS[name]
    leaves, tree = jax.tree.flatten(params)
    learned = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)}

    def spikes(learned, xs):
        params = tree.unflatten([learned.get(i, leaf) for i, leaf in enumerate(leaves)])
        return sf.unroll(neuron, params, None, arranged(name, xs), implementation=implementation)[0].reshape(xs.shape)

    return spikes, learned


def compiled_anew(f, *args):
    """`compiled` without what was compiled before."""
    jax.clear_caches()
    triton.kernel.cache_clear()
    return compiled(f, *args)


def compile_time(implementation, T, M, first):
    def seconds(T):
        spikes, learned = spikes_of("lif", implementation)
        xs = jax.ShapeDtypeStruct((T, M), f32)
        return compiled_anew(forward_backward(spikes), (learned, xs), xs)[1]["compile_s"]

    return (dict(first_s=seconds(1)) if first else {}) | dict(compile_s=seconds(T))


SCAN = {}  # the last case that scan ran: its results and its milliseconds


def layer(name, T, M, dtype, implementation, tiny):
    spikes, learned = spikes_of(name, implementation)
    both, forward = forward_backward(spikes), lambda args, cotangent: spikes(*args)
    draw, count = inputs(name, T, M, dtype, learned)
    shapes, drawn = jax.eval_shape(draw, 0), draw.lower(0).compile()
    program, row = compiled_anew(both, *shapes)
    programs = [repeated(f, [shapes] * count) for f in (both, forward)]
    yield
    calls = [drawn(i) for i in range(count)]
    got = program(*calls[0])
    ms, *quartiles = device_ms(programs[0], calls)
    brief = dict(repeats=3, seconds=0.02)
    row |= dict(ms=ms, quartiles=quartiles, call_ms=time_ms(program, *calls[0], **brief)[0])
    row |= dict(forward_ms=device_ms(programs[1], calls, **brief)[0])
    del row["compile_s"]  # with --jobs others compiled beside it
    nbytes = got[0].nbytes
    row |= dict(of_copy_rate=5 * nbytes / rate(tiny) / (ms * 1e-3), peak_units=row.pop("peak_mb") * 1e6 / nbytes)
    row |= dict(firing_rate=float(jnp.mean(got[0].astype(f32))))
    case = name, T, M, dtype
    if implementation == "scan":
        SCAN.clear()
        SCAN[case] = got, row["ms"]
    elif case in SCAN:
        want, ms = SCAN[case]
        differ = got[0] != want[0]
        row |= dict(over_scan=ms / row["ms"], spikes_that_differ=int(differ.sum()))
        row |= dict(gradient_error=gradient_error(got[1], want[1], ~differ.any(0)))
        if not row["gradient_error"] <= (1e-3 if dtype == f32 else 2e-2):  # NaN is wrong too
            row |= dict(status=f"wrong: gradient error {row['gradient_error']:.2g}", ms=None)
    yield row


def milliseconds(name, T, M, dtype, implementation):
    """Device time of the forward and the backward pass."""
    spikes, learned = spikes_of(name, implementation)
    draw, count = inputs(name, T, M, dtype, learned, most=2**29)
    yield from device_time(forward_backward(spikes), draw, count, repeats=5, seconds=0.02)


def gradient_error(got, want, lanes):
    """`largest_error` of the gradients; that of xs only in those lanes. Where a spike differs, another gradient is right.

    NaN if there is no such lane, because then nothing is compared.
    """
    (got, got_xs), (want, want_xs) = got, want
    error = largest_error((got, got_xs * lanes), (want, want_xs * lanes))
    return float(jnp.where(lanes.any(), error, jnp.nan))


def differing(name, implementation, shape):
    xs = jax.random.normal(jax.random.key(0), shape) + 0.3
    xs = jnp.round(xs, 1) if name == "grid of 0.1" else xs
    run = lambda xs, how: sf.unroll(sf.LIF(), sf.LIFParams(0.7), None, xs, implementation=how, out_dtype=jnp.bool_)[0]
    run = jax.jit(run, static_argnums=1)
    want, got = run(xs, "scan"), run(xs, implementation)
    return dict(slots=xs.size, differ=int((got != want).sum()), firing_rate=float(want.mean()))


def fastest_blocks(name, T, M, dtype, implementation, seconds, tiny):
    """The ten fastest block sizes that `snnfuse.autotune` finds, and the slowest."""
    (_, xs), _ = inputs(name, T, M, dtype)[0](0)
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, XDG_CACHE_HOME=folder):
        options = dict(implementation=implementation, seconds=0.0 if tiny else seconds)
        timed = sf.autotune(*NEURONS[name], None, arranged(name, xs), **options)
    tuning.read.cache_clear()  # later calls use their own choice again
    tried = [(ms, list(blocks)) for ms, blocks in (*timed[:10], timed[-1])]
    return dict(ms=timed[0][0], of_copy_rate=5e3 * xs.nbytes / rate(tiny) / timed[0][0], tried=tried)


def run_tests(tests, name):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests, "-k", name]
    done = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True)
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|error)", done.stdout)}
    row = dict(passed=counts.get("passed", 0), failed=counts.get("failed", 0) + counts.get("error", 0))
    return row | (dict(status=f"pytest ended with {done.returncode}") if done.returncode else {})


if __name__ == "__main__":
    main(__doc__, "core", "flips", "tune", "contract", "choice")
