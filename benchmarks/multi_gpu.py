"""What do several GPUs of one host gain? The links, one layer under `jit`, data parallel training, and time over devices.

    python benchmarks/multi_gpu.py                             all of it on 1, 2, 4 and 8 devices, or as many as there are
    python benchmarks/multi_gpu.py --devices 2 --only 'all-reduce|resnet18'
    python benchmarks/multi_gpu.py --processes 2               one process for each device
    python benchmarks/multi_gpu.py --library spikingjelly      SpikingJelly with DistributedDataParallel, a process per GPU
    XLA_FLAGS=--xla_force_host_platform_device_count=4 python benchmarks/multi_gpu.py --tiny        on a CPU

Rows go to results/multi_gpu.jsonl. A training step is forward, backward and Adam on random input; `peak_mb` is what its
program holds on one device. `small-net` must have the same loss and norm of the gradient on every mesh. A CPU's simulated
devices share the same cores: there the run only checks that everything works.
"""

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
from with_jax import compiled, forward_backward, resnet, time_ms, time_step, training_step

import snnfuse as sf
from snnfuse import nn, parallel


@question(
    "multi_gpu",
    devices=("1,2,4,8", "numbers of devices; those that do not exist are left out"),
    T=("32,512,4096", "time steps, for time over devices"),
    library=("snnfuse", "snnfuse or spikingjelly"),
    processes=(0, "so many processes, each with one device"),
)
def multi_gpu(args):
    if args.library == "spikingjelly":
        return torch_cases(args)
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
    tiny, how = args.tiny, "interpret" if args.tiny else None
    same = dict(processes=args.processes) if args.processes else {}
    for n in split(args.devices, int):
        if n > jax.device_count():
            continue
        for size in ((2**10, 2**16) if tiny else (2**10, 2**16, 2**20, 2**24, 2**28)) if n > 1 else ():
            for kind in ("all-reduce", "hand-over"):
                yield Case(dict(case=kind, devices=n, bytes=size) | same, link, (kind, n, size))
        T, M = (8, 2**10) if tiny else (32, 2**21)
        yield Case(dict(case="unroll", devices=n, T=T, M=M, implementation="the default") | same, lanes, (n, T, M, how))

        def step(name, T, B, axes, synchronised=False, sums=None, needs=None, n=n):
            key = dict(
                case=name, dtype=DTYPES[name], devices=n, T=T, B=B, mesh=axes, synchronised=synchronised, sums=sums
            )
            key |= dict(implementation="the default")
            return Case(key | same, training, (name, axes, T, B, how, synchronised, sums), needs=needs)

        data, along, (T, part, whole) = {"data": n}, {"time": n}, (8, 2, 4 * n) if tiny else (32, 100, 200)
        if n > 1:  # every mesh gives what one device gives
            T_, B_ = (16, 8) if tiny else (32, 64)
            one = step("small-net", T_, B_, {"data": 1}, True, n=1)
            yield one
            for axes in (data, along, {"data": 2, "time": n // 2}) if n > 2 else (data, along):
                yield step("small-net", T_, B_, axes, True, needs=one)
        yield step("resnet18", T, part * n, data)  # weak scaling: the same part of the batch for each device
        if n > 1:
            yield step("resnet18", T, part * n, data, sums="bfloat16")
            yield step("resnet18", T, part * n, data, synchronised=True)
        if part * n != whole and whole % n == 0:
            yield step("resnet18", T, whole, data)  # strong scaling: the same batch for all devices
        for name in ("lif-stack", "resnet18"):
            for T in (8 * n,) if tiny else split(args.T, int):
                yield step(name, T, 4 if tiny else 16, along)
        for T in () if tiny else (2**13, 2**14):  # one device cannot hold the last
            yield step("lif-stack", T, 16, along)


DTYPES = {"resnet18": "bfloat16", "lif-stack": "float32", "small-net": "float32"}
SHAPES = {"resnet18": (28, 28, 3), "lif-stack": (2**13,), "small-net": (16, 16, 2)}  # of one sample


def timed(f, *args):
    jax.block_until_ready(f(*args))
    if jax.default_backend() == "cpu":
        return dict(functional_check_only=True)
    ms, *quartiles = time_ms(f, *args)
    return dict(ms=ms, quartiles=quartiles)


def link(kind, n, size):
    """One all-reduce, or one hand-over of each device to the next."""
    mesh = parallel.make_mesh({"d": n})
    hand_over = lambda x: jax.lax.ppermute(x, "d", [(i, i + 1) for i in range(n - 1)])
    f = (lambda x: jax.lax.psum(x, "d")) if kind == "all-reduce" else hand_over
    run = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=P("d"), out_specs=P("d"), check_vma=False))
    return timed(run, parallel.shard(jnp.ones((n, size // 4), jnp.float32), mesh, P("d")))


def lanes(n, T, M, how):
    """`unroll` forward and backward under `jit`, with M lanes on each device; no sequence may travel between devices."""
    mesh = parallel.make_mesh({"data": n})
    run = forward_backward(lambda d, xs: sf.unroll(sf.LIF(), sf.LIFParams(d, 1.0), None, xs, implementation=how)[0])
    draw = lambda seed: parallel.shard(jax.random.normal(jax.random.key(seed), (T, n, M)), mesh, P(None, "data"))
    args = (parallel.shard(jnp.float32(0.6), mesh), draw(0)), draw(1)
    if "all-gather" in run.lower(*args).compile().as_text():
        return dict(status="wrong: a sequence was gathered")
    return timed(run, *args)


def network(name, how):
    """(the network, its readout)"""
    if name == "resnet18":
        return resnet(how, 18, "bfloat16"), nn.membrane_mean
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
    step, leaves = training_step(model, read, mesh=mesh, specs=specs, sums=sums, norm=name == "small-net")
    data = [batch(i, SHAPES[name], T, B, mesh, specs) for i in range(2)]
    program, row = compiled(step, leaves, *data[0])
    leaves, metrics = program(leaves, *data[0])
    row |= {key: float(value) for key, value in metrics.items()}
    for key in ("loss", "grad_norm") if want else ():
        if abs(row[key] / want[key] - 1) > 1e-4:
            return row | dict(status=f"wrong: {key} {row[key]:.7g}, on one device {want[key]:.7g}")
    if jax.default_backend() == "cpu":
        return row | dict(functional_check_only=True)
    row |= time_step(program, leaves, data)
    return row | dict(samples_per_s=B / row["ms"] * 1e3)


def batch(seed, shape, T, B, mesh, specs):
    """Random (xs, labels), made on their devices: spikes for images, currents for the stack."""

    def draw():
        keys = jax.random.split(jax.random.key(seed))
        labels = jax.random.randint(keys[1], (B,), 0, 10)
        if len(shape) == 1:
            return jax.random.normal(keys[0], (T, B, *shape)), labels
        return jax.random.bernoulli(keys[0], 0.5, (T, B, *shape)), labels

    return jax.jit(draw, out_shardings=tuple(NamedSharding(mesh, spec) for spec in specs))()


def torch_cases(args):
    import torch

    T, part, size = (2, 2, 16) if args.tiny else (32, 100, 28)
    for dtype in ("tf32", "bfloat16"):
        for n in split(args.devices, int):
            if n <= (torch.cuda.device_count() or 2):
                key = dict(case="resnet18", library="spikingjelly", implementation="DDP", dtype=dtype, devices=n, T=T)
                yield Case(key | dict(B=part * n, mesh={"data": n}), ddp, (n, dtype, T, part, size))


def ddp(devices, dtype, T, part, size):
    from torch import multiprocessing

    pipe = multiprocessing.get_context("spawn").SimpleQueue()
    multiprocessing.spawn(ddp_worker, (devices, dtype, T, part, size, pipe), nprocs=devices)
    row = pipe.get()
    return row | dict(samples_per_s=part * devices / row["ms"] * 1e3)


def ddp_worker(rank, devices, dtype, T, part, size, pipe):
    """One GPU's process; `ms` is that of the slowest."""
    import libraries
    import torch
    from runner import time_ms
    from torch import distributed
    from with_torch import CUDA, resnet_step, sync

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29501"}
    distributed.init_process_group("nccl" if CUDA else "gloo", rank=rank, world_size=devices)
    device = torch.device("cuda", rank) if CUDA else torch.device("cpu")
    if CUDA:
        torch.cuda.set_device(device)
    wrap = partial(torch.nn.parallel.DistributedDataParallel, gradient_as_bucket_view=True)
    kind = "bfloat16" if dtype == "bfloat16" else "float32"
    step = resnet_step(libraries.spikingjelly().lif("triton", kind), dtype, T, part, size, device, wrap)
    row = dict(losses=[float(step()) for _ in range(4)])
    if CUDA:  # the first steps try algorithms
        torch.cuda.reset_peak_memory_stats()
    times = torch.tensor(time_ms(step, sync, agree=lambda count: 8 if CUDA else 1), device=device)
    distributed.all_reduce(times, distributed.ReduceOp.MAX)
    if rank == 0:
        ms, *quartiles = times.tolist()
        row |= dict(peak_mb=torch.cuda.max_memory_allocated() / 1e6) if CUDA else {}
        pipe.put(row | dict(ms=ms, quartiles=quartiles))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(__doc__, "multi_gpu")
