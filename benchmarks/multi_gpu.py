"""What do several GPUs of one host gain? The links between them, data parallel training, and time over devices.

    python benchmarks/multi_gpu.py                             all of it on 1, 2, 4 and 8 devices, or as many as there are
    python benchmarks/multi_gpu.py --devices 2 --only 'all-reduce|resnet18'
    python benchmarks/multi_gpu.py --processes 2               one process for each device
    XLA_FLAGS=--xla_gpu_use_memcpy_local_p2p=true python benchmarks/multi_gpu.py --only sew --note memcpy_local_p2p
    XLA_FLAGS=--xla_force_host_platform_device_count=4 python benchmarks/multi_gpu.py --tiny        on a CPU

Rows go to results/multi_gpu.jsonl. A training step is forward, backward and Adam on random input; `peak_mb` is what its
program holds on one device. `small-net` must have the same loss and norm of the gradient on every mesh. The simulated
devices of a CPU share its cores, so a run there only checks that everything works.
"""

import math
import os
import subprocess
import sys
import time
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from runner import Case, main, question, split
from with_jax import batch, resnet, time_ms, time_step, training_step

from snnfuse import models, nn, parallel


@question(
    "multi_gpu",
    devices=("1,2,4,8", "numbers of devices; those that do not exist are left out"),
    T=("32,512,4096", "time steps, for time over devices"),
    processes=(0, "so many processes, each with one device"),
    note=("", "what is special about this run, such as XLA_FLAGS; part of the rows' names"),
)
def multi_gpu(args):
    if args.processes and "SNNFUSE_PROCESS" not in os.environ:
        sys.exit(each_in_a_process(args.processes))
    if process := os.environ.get("SNNFUSE_PROCESS"):  # before anything asks JAX for its devices
        parallel.initialise("localhost:9911", args.processes, int(process))
    return jax_cases(args)


def each_in_a_process(count):
    """Starts this script once per device; if one process fails, the others are stopped, since they would wait for it."""
    env = lambda i: os.environ | {"SNNFUSE_PROCESS": str(i), "CUDA_VISIBLE_DEVICES": str(i)}
    out = lambda i: ["--out", os.devnull] if i else []  # the first one writes the rows
    running = [subprocess.Popen([sys.executable, *sys.argv, *out(i)], env=env(i)) for i in range(count)]
    while any(p.poll() is None for p in running) and not any(p.poll() for p in running):
        time.sleep(0.1)
    for p in running:
        p.terminate()
    return max(abs(p.wait()) for p in running)


def jax_cases(args):
    same = (dict(processes=args.processes) if args.processes else {}) | (dict(note=args.note) if args.note else {})
    for n in [n for n in split(args.devices, int) if n <= jax.device_count()]:
        for size in ((2**10, 2**16) if args.tiny else (2**10, 2**16, 2**20, 2**24, 2**28)) if n > 1 else ():
            for kind in ("all-reduce", "hand-over"):
                yield Case(dict(case=kind, devices=n, bytes=size) | same, link, (kind, n, size))
        one = None
        for name, T, B, axes, options in steps(n, args.tiny, split(args.T, int)):
            key = dict(case=name, dtype=DTYPES[name], devices=math.prod(axes.values()), T=T, B=B, mesh=axes)
            key |= dict(synchronised=False, sums=None, implementation="the default") | options | same
            how = "interpret" if args.tiny else None
            arguments = name, axes, T, B, how, key["synchronised"], key["sums"]
            case = Case(key, training, arguments, needs=one if name == "small-net" else None)
            one = one or case  # the first is the small net on one device
            yield case


def steps(n, tiny, lengths):
    """The training steps on n devices: (name, T, B, axes of the mesh, options)."""
    data, along, (T, part, whole) = {"data": n}, {"time": n}, (8, 2, 4 * n) if tiny else (32, 100, 200)
    if n > 1:  # every mesh must give what one device gives
        both = [{"data": 2, "time": n // 2}] if n > 2 else []
        for axes in ({"data": 1}, data, along, *both):
            yield "small-net", 16 if tiny else 32, 8 if tiny else 64, axes, dict(synchronised=True)
    for options in ({}, dict(sums="bfloat16"))[: 2 if n > 1 else 1]:
        yield "resnet18", T, part * n, data, options  # weak scaling: each device has the same part of the batch
    if part * n != whole and whole % n == 0:
        yield "resnet18", T, whole, data, {}  # strong scaling: all devices together have the same batch
    if not tiny:  # 224 x 224 is too large for a CPU
        yield "sew-resnet18", 4, 32 * n, data, {}  # weak scaling
    for name in ("lif-stack", "resnet18"):
        for T in (8 * n,) if tiny else lengths:
            yield name, T, 4 if tiny else 16, along, {}
    for T in () if tiny else (2**13, 2**14):  # one device cannot hold the last
        yield "lif-stack", T, 16, along, {}


DTYPES = {"resnet18": "bfloat16", "sew-resnet18": "bfloat16", "lif-stack": "float32", "small-net": "float32"}
SHAPES = {"resnet18": (28, 28, 3), "sew-resnet18": (224, 224, 3), "lif-stack": (2**13,), "small-net": (16, 16, 2)}


def link(kind, n, size):
    """One all-reduce, or one hand-over of each device to the next."""
    mesh = parallel.make_mesh({"d": n})
    hand_over = lambda x: jax.lax.ppermute(x, "d", [(i, i + 1) for i in range(n - 1)])
    f = (lambda x: jax.lax.psum(x, "d")) if kind == "all-reduce" else hand_over
    run = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=P("d"), out_specs=P("d"), check_vma=False))
    ms, *quartiles = time_ms(run, parallel.shard(jnp.ones((n, size // 4), jnp.float32), mesh, P("d")))
    return dict(ms=ms, quartiles=quartiles)


def network(name, how):
    """(the network, its readout)"""
    if name == "resnet18":
        return resnet(how, 18, "bfloat16"), nn.membrane_mean
    if name == "sew-resnet18":
        options = dict(stem="imagenet", policy="bfloat16", implementation=how, rngs=nnx.Rngs(0))
        return models.sew_resnet(18, 3, 1000, **options), nn.membrane_mean
    if name == "lif-stack":
        return nn.Sequential(*(nn.LIF(tau=2.0, learn="decay", implementation=how) for _ in range(8))), nn.spike_rate
    layers = []
    for features, width in ((2, 32), (32, 64)):
        norm = nn.BatchNorm(width, rngs=nnx.Rngs(0))
        options = dict(use_bias=False, precision="highest", rngs=nnx.Rngs(width))
        layers += [nn.Conv(features, width, (3, 3), 2, padding=1, **options)]
        layers += [nn.NormSpiking(nn.LIF(tau=2.0, implementation=how), norm)]
    head = nn.Linear(64, 10, precision="highest", rngs=nnx.Rngs(1))
    return nn.Sequential(*layers, nn.mean_pool, head), nn.membrane_mean


def training(name, axes, T, B, how, synchronised, sums, want=None):
    """A training step on a mesh; `want` is the row of one device, whose loss and norm of the gradient it must have."""
    mesh = parallel.make_mesh(axes)
    time_axis, data_axis = (axis if axis in axes else None for axis in ("time", "data"))
    model, read = network(name, how)
    model.train()
    if synchronised or time_axis:
        parallel.synchronise_batch_norm(model, mesh.axis_names if synchronised else (time_axis,))
    if time_axis:
        parallel.over_time(model)
        read = partial(parallel.readout, read)
    specs = P(time_axis, data_axis), P(data_axis)
    step = training_step(model, read, mesh=mesh, specs=specs, sums=sums, norm=name == "small-net")
    places = tuple(NamedSharding(mesh, spec) for spec in specs)
    data = [jax.jit(partial(inputs, SHAPES[name], T, B, seed), out_shardings=places)() for seed in range(2)]
    row = time_step(step, data)
    for key in ("loss", "grad_norm") if want else ():
        if not abs(row[key] / want[key] - 1) <= 1e-4:
            return row | dict(status=f"wrong: {key} {row[key]:.7g}, on one device {want[key]:.7g}", ms=None)
    return row | dict(samples_per_s=B / row["ms"] * 1e3)


def inputs(shape, T, B, seed):
    """Random (xs, labels): spikes for images, currents for the stack."""
    xs, labels = batch(seed, T, B, *shape)
    return (jax.random.normal(jax.random.key(seed), xs.shape) if len(shape) == 1 else xs), labels


if __name__ == "__main__":
    main(__doc__, "multi_gpu")
