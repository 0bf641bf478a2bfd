"""How fast is snnfuse beside the other libraries, on the same tensors and the same device?

    python benchmarks/peers.py                    three minutes on an H100; rows go to results/peers.jsonl
    python benchmarks/peers.py --tiny             small shapes, also without a GPU
    python benchmarks/peers.py --only 'shd|n512' --libraries snnfuse,spikingjelly --keep

The other libraries are not dependencies of snnfuse: install them with `pip install --no-deps --target FOLDER ...` and put
FOLDER on PYTHONPATH. Each library has a process of its own; libraries.py says how each is called.

    XLA_PYTHON_CLIENT_MEM_FRACTION=.95 python benchmarks/peers.py largest_T --ways pallas_lean --T 7200,9920
    python benchmarks/peers.py largest_T --library spikingjelly --ways triton --T 1850,1900

`largest_T` finds the longest sequence whose training step fits on one GPU (Spiking-ResNet-18, B=100, 3 x 28 x 28, Adam).
Each length runs in a process of its own and gives a row of results/largest_T.jsonl. If it does not fit, the row's status is
the error.

    CUDA_VISIBLE_DEVICES= python benchmarks/peers.py on_cpu        two minutes on two CPU cores; rows go to results/on_cpu.jsonl

`on_cpu` compares a training step of a network 784-1000-10 on a CPU. Run it on an idle machine: other work delays PyTorch's
threads more than XLA's. The quartiles and the shortest step show whether there was any.

Every case is checked before it is timed. Its spikes must equal those of `lax.scan` with the same neuron of ours. A single
LIF layer must also have the same gradient, and an SHD step the same loss. A wrong result gets no time. In every library one
matrix product covers all time steps; a library that usually multiplies at each step gains from that.
"""

import importlib
import os
from dataclasses import dataclass
from functools import cache, partial

import libraries
import numpy as np
from runner import Case, each_ms, main, question, split


@dataclass(frozen=True)
class Task:
    """`shape`: [T, N] for "lif"; [T, B, n] for "linear" (and LIF); [T, B, in, hidden, out] for "shd" and
    "recurrent" (the same with a recurrent hidden layer); [T, B, size] for "resnet"."""

    kind: str
    shape: tuple[int, ...]


CASES = [  # name, dtype, task; the most important first, because --budget cuts the end
    ("lif_T32_N1048576", "float32", Task("lif", (32, 2**20))),
    ("lif_T32_N1048576", "bfloat16", Task("lif", (32, 2**20))),
    ("lif_T500_N8192", "float32", Task("lif", (500, 2**13))),
    ("resnet18_28", "tf32", Task("resnet", (32, 100, 28))),
    ("resnet18_28", "bfloat16", Task("resnet", (32, 100, 28))),
    ("open_neuromorphic_n512", "tf32", Task("linear", (500, 16, 512))),
    ("shd", "tf32", Task("shd", (256, 256, 700, 128, 20))),
    ("shd_recurrent", "tf32", Task("recurrent", (100, 256, 700, 512, 20))),
    ("lif_T256_N131072", "float32", Task("lif", (256, 2**17))),
    ("open_neuromorphic_n4096", "tf32", Task("linear", (500, 16, 4096))),
    ("open_neuromorphic_n16384", "tf32", Task("linear", (500, 16, 16384))),
]
TINY = {
    "lif": (6, 256),
    "linear": (5, 2, 32),
    "shd": (6, 4, 700, 16, 20),
    "recurrent": (6, 4, 700, 16, 20),
    "resnet": (2, 2, 16),
}
# The share of spikes that may differ. Rounding a decay changes a few; a matrix product in TF32 changes more.
FLIPS = {"lif": 1e-5, "linear": 1e-2, "shd": 1e-2, "recurrent": 1e-2}
LOSS_ERROR = 1e-2
GRADIENT_ERROR = {"float32": 1e-4, "bfloat16": 3e-2}

# The ways of the libraries that run these tasks; in SpikingJelly a recurrent container runs step by step.
WAYS = {
    "resnet": dict(snnfuse=("pallas",), spikingjelly=("triton", "relu")),
    "recurrent": dict(snnfuse=("triton", "scan"), spikingjelly=("loop",), snntorch=("loop",)),
}
FLOAT32_ONLY = ("snntorch", "norse")


@question("peers", libraries=("", "only these libraries, separated by commas"))
def peers(args):
    for name, dtype, task in CASES:
        task = Task(task.kind, TINY[task.kind]) if args.tiny else task
        for library in split(args.libraries) or libraries.TABLE:
            _, neuron, ways = libraries.TABLE[library]
            if dtype == "bfloat16" and library in FLOAT32_ONLY:
                continue
            for way in WAYS[task.kind].get(library, ()) if task.kind in WAYS else ways:
                key = dict(case=name, library=library, implementation=way, dtype=dtype)
                if task.kind == "resnet":
                    yield Case(key, resnet, (task, dtype, library, "scan" if args.tiny else way), library)
                    continue
                if args.tiny and library == "snnfuse":
                    way = "scan" if task.kind == "recurrent" else "interpret"
                needs = dict(case=name, dtype=dtype, library=neuron)
                needs = Case(needs, reference, (task, dtype, neuron), "snnfuse")
                yield Case(key, measure, (task, dtype, library, way), library, needs)


@cache
def opened(library):
    """(the library, the module that times it), imported in a process of its own."""
    return getattr(libraries, library)(), importlib.import_module(libraries.TABLE[library][0])


@cache
def _draws(seed):
    return np.random.default_rng(seed).standard_normal(4_194_301, np.float32)


def normal(seed, *shape):
    """Normal numbers that repeat after 4,194,301, a prime. Drawing 2^28 different ones would take seconds."""
    return np.resize(_draws(seed), shape)


def lif(side, lif, readout, shape, dtype):
    """A LIF layer, forward and backward for its input."""
    x, cotangent = (side.array(a, dtype) for a in (normal(0, *shape) + np.float32(0.3), normal(1, *shape)))
    call = side.pullback(lambda x, _: lif(x))
    spikes, gradient = call(x, None, cotangent)
    sets = [(side.roll(x, i), None, side.roll(cotangent, -i)) for i in range(2)]
    return dict(spikes=spikes, gradient=gradient), call, sets


def linear(side, lif, readout, shape, dtype):
    """A linear layer and LIF, forward and backward for the weight."""
    T, B, n = shape
    x, weight, cotangent = map(
        side.array, (normal(0, T, B, n), normal(2, n, n) * np.float32(n**-0.5), normal(1, T, B, n))
    )
    call = side.pullback(lambda weight, x: lif(x @ weight))
    return dict(spikes=call(weight, x, cotangent)[0]), call, [(weight, side.roll(x, i), cotangent) for i in range(2)]


def shd(side, layer, readout, shape, dtype, recurrent=False):
    """A training step in the shapes of SHD, on random input of rate 0.03.

    If the hidden layer is recurrent, its weights are multiples of 2^-10, which TF32 holds exactly.
    """
    T, B, features, hidden, classes = shape
    rng = np.random.default_rng(0)
    xs = side.array((rng.random((T, B, features), np.float32) < 0.03).astype(np.float32))
    labels = side.array(rng.integers(0, classes, B))
    draws = [normal(2, features, hidden) * np.float32(0.15 if recurrent else 0.2)]
    if recurrent:
        draws.append(normal(4, hidden, hidden) * np.float32(0.3 * hidden**-0.5))
        draws = [np.round(1024 * draw) / np.float32(1024) for draw in draws]
    draws.append(normal(3, hidden, classes) * np.float32(0.1))

    def loss_of(weights, xs, labels):
        spikes = layer(xs @ weights[0], *weights[1:-1])
        return side.cross_entropy(readout(spikes @ weights[-1]).mean(0), labels), spikes

    weights = [side.array(draw) for draw in draws]
    loss, spikes = side.run_once(loss_of, weights, xs, labels)
    step, state = side.train(loss_of, weights)
    return dict(spikes=spikes, loss=float(loss)), step, [(*state, side.roll(xs, i), labels) for i in range(2)]


KINDS = dict(lif=lif, linear=linear, shd=shd, recurrent=partial(shd, recurrent=True))


def layer_of(lib, task, way, dtype):
    return lib.recurrent(way) if task.kind == "recurrent" else lib.lif(way, dtype)


def reference(task, dtype, neuron):
    """The results of `lax.scan` on this device with the neuron of that name. Only each `stride`-th lane's gradient is kept."""
    import jax

    ours, side = opened("snnfuse")
    with jax.default_matmul_precision("highest"):
        way = f"scan {neuron}"
        found, *_ = KINDS[task.kind](side, layer_of(ours, task, way, dtype), ours.readout(way), task.shape, dtype)
    found["spikes"] = np.packbits(np.asarray(found["spikes"] != 0))
    if "gradient" in found:
        found["gradient"] = side.to_numpy(found["gradient"])[:, :: stride(task)]
    return found


def stride(task):
    return max(1, task.shape[-1] // 2**16)


def measure(task, dtype, library, way, want):
    row, side, call, sets = compared(task, dtype, library, way, want)
    return row | ({} if "status" in row else side.measure(call, sets))


def compared(task, dtype, library, way, want):
    """(a row that says how the results differ from the wanted ones, the module that times the library, the call, its inputs)"""
    lib, side = opened(library)
    dtype = "float32" if dtype == "tf32" else dtype
    kind, readout = KINDS[task.kind], lib.readout and lib.readout(way)
    found, call, sets = kind(side, layer_of(lib, task, way, dtype), readout, task.shape, dtype)
    row = compare(task, dtype, {k: v if k == "loss" else side.to_numpy(v) for k, v in found.items()}, want)
    return dict(version=lib.version) | row, side, call, sets


def compare(task, dtype, found, want):
    """How the spikes, gradient and loss differ from the wanted ones; with a `status` if they differ too much."""
    fires = found["spikes"] != 0
    wanted = np.unpackbits(want["spikes"], count=fires.size).reshape(fires.shape).astype(bool)
    row = dict(flips=int((fires != wanted).sum()), slots=fires.size, firing_rate=float(wanted.mean()))
    if row["flips"] > FLIPS[task.kind] * fires.size:
        return row | dict(status=f"wrong: {row['flips']} of {row['slots']} spikes differ")
    if "gradient" in want:
        same = (fires == wanted).all(0)[:: stride(task)]
        got, gradient = found["gradient"][:, :: stride(task)][:, same], want["gradient"][:, same]
        row["gradient_error"] = float(np.abs(got - gradient).max() / np.abs(gradient).max())
        if not row["gradient_error"] < GRADIENT_ERROR[dtype]:
            return row | dict(status=f"wrong: gradient error {row['gradient_error']:.2g}")
    if "loss" in want:
        row["loss"] = found["loss"]
        if not abs(row["loss"] / want["loss"] - 1) < LOSS_ERROR:
            return row | dict(status=f"wrong: a loss of {row['loss']:.4g}, expected {want['loss']:.4g}")
    return row


@question(
    "on_cpu",
    gpu=False,
    libraries=("snnfuse,snntorch", "which of them; the others are compared with the first"),
    rounds=(300, "steps of each"),
)
def on_cpu(args):
    task = Task("shd", (2, 4, 784, 32, 10) if args.tiny else (25, 64, 784, 1000, 10))
    T, B, *widths = task.shape
    names = tuple(split(args.libraries))
    for library in names:
        key = dict(case="-".join(map(str, widths)), library=library, dtype="float32", T=T, B=B)
        yield Case(key, in_turn, (task, names, 3 if args.tiny else args.rounds, library))


def in_turn(task, names, rounds, library):
    every = steps_in_turn(task, names, rounds)
    (row, times), (_, first) = every[library], every[names[0]]
    low, ms, high = np.quantile(times, (0.25, 0.5, 0.75)).tolist()
    right = "status" not in every[names[0]][0]
    found = dict(
        ms=ms,
        quartiles=(low, high),
        shortest_ms=min(times),
        over=ms / float(np.median(first)) if right else None,
        rounds=rounds,
    )
    return row if "status" in row else row | found | dict(cores=os.cpu_count())


@cache
def steps_in_turn(task, names, rounds):
    """{library: (a row, the milliseconds of its steps)}. The libraries take turns, so that other work delays all of them."""
    rows, calls = {}, {}
    for name in names:
        _, neuron, (way, *_) = libraries.TABLE[name]
        way = "scan" if name == "snnfuse" else way
        rows[name], side, step, (args, _) = compared(task, "float32", name, way, reference(task, "float32", neuron))
        calls[name] = lambda side=side, step=step, args=args: side.sync(step(*args))
    every = [{name: each_ms(call, 1)[0] for name, call in calls.items()} for _ in range(rounds + 2)][2:]
    return {name: (row, [ms[name] for ms in every]) for name, row in rows.items()}


@question(
    "largest_T",
    library=("snnfuse", "snnfuse or spikingjelly"),
    ways=("pallas_packed", "implementation_memory of snnfuse, or the way of SpikingJelly"),
    dtype=("bfloat16", "of the convolutions"),
    T=("4800", "time steps"),
)
def largest_T(args):
    B, size = (2, 16) if args.tiny else (100, 28)
    for way in ["scan_packed"] if args.tiny else split(args.ways):
        for T in [2] if args.tiny else split(args.T, int):
            implementation, _, memory = way.partition("_")
            key = dict(case="spiking-resnet-18", library=args.library, implementation=implementation)
            key |= dict(memory=memory or None, dtype=args.dtype, T=T, B=B, size=size)
            yield Case(key, resnet, (Task("resnet", (T, B, size)), args.dtype, args.library, way), "fresh")


def resnet(task, dtype, library, way):
    """A training step of Spiking-ResNet-18; nothing is compared."""
    lib, side = opened(library)
    if library == "snnfuse":
        implementation, _, memory = way.partition("_")
        step = side.training_step(side.resnet(implementation, 18, dtype, memory))
        row = dict(version=lib.version) | side.time_step(step, side.batches(*task.shape, count=1))
        return row | dict(call_ms=row["ms"])
    kind = "bfloat16" if dtype == "bfloat16" else "float32"
    step = side.resnet_step(None if way == "relu" else lib.lif(way, kind), dtype, *task.shape)
    row = dict(version=lib.version, losses=[float(step())])
    return row | side.measure(step, [()], no_graph="not tried: a failed capture leaves PyTorch unusable")


if __name__ == "__main__":
    main(__doc__, "peers", "on_cpu", "largest_T")
