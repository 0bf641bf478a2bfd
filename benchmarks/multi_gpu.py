"""Several devices of one host: the links, sharded `jit`, data parallel training, time over devices, and both at once.

    python benchmarks/multi_gpu.py                          all of it on 1, 2, 4 and 8 devices, or as many as there are
    python benchmarks/multi_gpu.py --devices 2 --only links,data
    XLA_FLAGS=--xla_force_host_platform_device_count=4 python benchmarks/multi_gpu.py --small           on a CPU

Rows go to results/multi_gpu.jsonl. On simulated devices it is a check that everything runs and is right, and the rows
say so and hold no times: they share the same cores. `links` gives what `snnfuse.parallel.plan.Machine` wants: one
all-reduce and one hand-over. A training step is forward, backward and Adam on random input; `loss` is that of the first
one, and `small-net`'s, with the norm of the gradient, must be that of one device. `peak_mb` is what the step's
program holds on one device. benchmarks/multi_gpu_torch.py is SpikingJelly beside it.
"""

import argparse
import os
import subprocess
import sys
import time
from functools import partial

import jax

from snnfuse import parallel

if process := os.environ.get("SNNFUSE_PROCESS"):  # "1 of 2", before anything asks JAX for its devices
    index, count = map(int, process.split(" of "))
    parallel.initialise("localhost:9911", count, index)

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from measure import fwd_bwd, normal_like, peak_mb, time_ms
from measure import record as write
from resnet import timed

import snnfuse as sf
from snnfuse import models, nn

CPU = jax.default_backend() == "cpu"
NEURONS = 2**13  # of a layer of the stack, a sample


def attempt(case, devices, f, **what):
    """A row of f() -> {...}; a failure is a row too. What f returned, or None."""
    if jax.process_count() > 1:
        what |= dict(processes=jax.process_count())
    record = partial(write, "multi_gpu") if jax.process_index() == 0 else lambda **row: None
    try:
        found = f()
    except Exception as e:
        record(case=case, devices=devices, **what, status=f"{type(e).__name__}: {str(e)[:200]}")
        return None
    record(case=case, devices=devices, **what, **found, status="ok")
    return found


def time_of(f, *args):
    jax.block_until_ready(f(*args))
    if CPU:
        return {"functional_check_only": True}
    ms, low, high = time_ms(f, *args)
    return {"ms": ms, "quartiles": [low, high]}


def same(got, want, rtol):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        error, scale = np.abs(a - b).max(), np.abs(b).max()
        assert error <= rtol * scale, f"error {error:.3g} of scale {scale:.3g}"


def links(n, small):
    """One all-reduce and one hand-over, of a few sizes: their latency and their bandwidth."""
    mesh = parallel.make_mesh({"d": n})
    run = partial(jax.shard_map, mesh=mesh, in_specs=P("d"), out_specs=P("d"), check_vma=False)
    reduce = jax.jit(run(lambda x: lax.psum(x, "d")))
    hand = jax.jit(run(lambda x: lax.ppermute(x, "d", [(i, i + 1) for i in range(n - 1)])))
    for size in (2**10, 2**16) if small else (2**10, 2**16, 2**20, 2**24, 2**28):
        x = parallel.shard(jnp.ones((n, size // 4), jnp.float32), mesh, P("d"))
        same(reduce(x)[0], jnp.full(size // 4, n), 0)
        attempt("all-reduce", n, partial(time_of, reduce, x), bytes=size)
        attempt("hand-over", n, partial(time_of, hand, x), bytes=size)


def lanes(n, small, implementation):
    """`unroll`, forward and backward, by jit alone: weak scaling over lanes."""
    T, M = (8, 2**10) if small else (32, 2**21)
    mesh = parallel.make_mesh({"data": n})
    f = lambda how, d, xs: sf.unroll(sf.LIF(), sf.LIFParams(d, 1.0), None, xs, implementation=how)
    run, scan = fwd_bwd(partial(f, implementation)), fwd_bwd(partial(f, "scan"))
    decay, xs = jnp.float32(0.6), jax.random.normal(jax.random.key(0), (T, n, M))
    cotangents = normal_like(jax.eval_shape(partial(f, "scan"), decay, xs))
    args = (parallel.shard(decay, mesh), parallel.shard(xs, mesh, P(None, "data")))
    d = tuple(parallel.shard(c, mesh, s) for c, s in zip(cotangents, (P(None, "data"), P("data")), strict=True))

    def found():
        if small or n == 1:
            same(run(args, d), scan((decay, xs), cotangents), 1e-4)
        assert "all-gather" not in run.lower(args, d).compile().as_text(), "a sequence was gathered"
        return time_of(run, args, d)

    attempt("unroll", n, found, T=T, lanes_a_device=M, implementation=implementation or "the default")


def resnet18(implementation):
    """Bits kept for the backward pass, bfloat16: what benchmarks/resnet.py calls packed."""
    options = dict(policy="bfloat16", implementation=implementation, rngs=nnx.Rngs(0))
    return models.spiking_resnet(18, 3, 10, **options), nn.membrane_mean


def stack(implementation):
    """Eight layers of neurons and nothing between them."""
    neuron = partial(nn.LIF, tau=2.0, learn="decay", implementation=implementation)
    return nn.Sequential(*(neuron() for _ in range(8))), nn.spike_rate


def small_net(implementation):
    """Float32, where all meshes must agree to rounding."""
    layers, features = [], 2
    for width in (32, 64):
        options = dict(use_bias=False, precision="highest", rngs=nnx.Rngs(width))
        layers += [nn.Conv(features, width, (3, 3), 2, padding=1, **options)]
        layers += [
            nn.NormSpiking(nn.LIF(tau=2.0, implementation=implementation), nn.BatchNorm(width, rngs=nnx.Rngs(0)))
        ]
        features = width
    head = nn.Linear(features, 10, precision="highest", rngs=nnx.Rngs(1))
    return nn.Sequential(*layers, nn.mean_pool, head), nn.membrane_mean


MODELS = {  # the network, and the shape of a sample
    "resnet18": (resnet18, (28, 28, 3)),
    "lif-stack": (stack, (NEURONS,)),
    "small-net": (small_net, (16, 16, 2)),
}


def training(name, axes, T, B, implementation, *, synchronised=False, sums=None, want=None):
    """One row of a training step of a network on a mesh: `sums` is the dtype of the gradients' way between devices, if
    not their own; `want` the loss and gradient that it must give."""
    mesh = parallel.make_mesh(axes)
    what = dict(T=T, batch=B, mesh=axes, synchronised=synchronised, sums=sums)
    what |= dict(implementation=implementation or "the default")
    run = partial(_training, name, mesh, T, B, implementation, synchronised, sums, want)
    return attempt(name, mesh.size, run, **what)


def _training(name, mesh, T, B, implementation, synchronised, sums, want):
    time_axis, data_axis = (
        ("time" if "time" in mesh.axis_names else None),
        ("data" if "data" in mesh.axis_names else None),
    )
    build, shape = MODELS[name]
    model, readout = build(implementation)
    model.train()
    if synchronised or time_axis:
        parallel.synchronise_batch_norm(model, mesh.axis_names if synchronised else (time_axis,))
    if time_axis:
        parallel.over_time(model)
    read = partial(parallel.readout, readout) if time_axis else readout
    # Its moments are in few arrays: half of what a call hands to every device.
    adam = parallel.flatten_optimizer(optax.adam(1e-3))
    graphdef, state = nnx.split((model, nnx.Optimizer(model, adam, wrt=nnx.Param)))
    leaves, tree = jax.tree.flatten(parallel.shard(state, mesh))

    def update(state, batch):
        model, optimizer = nnx.merge(graphdef, state)
        xs, labels = batch

        def loss_of(model):
            logits = read(model(xs)[0])
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        loss, grads = nnx.value_and_grad(loss_of)(model)
        grads = parallel.mean_gradients(grads, dtype=sums)
        optimizer.update(model, grads)
        norm = optax.tree.norm(grads) if name == "small-net" else jnp.nan  # 60 kernels of a ResNet's step
        return nnx.state((model, optimizer)), {"loss": loss, "grad_norm": norm}

    update = parallel.data_parallel(update, mesh, batch=(P(time_axis, data_axis), P(data_axis)))

    @partial(jax.jit, donate_argnums=0)
    def step(leaves, xs, labels):
        state, metrics = update(tree.unflatten(leaves), (xs, labels))
        return jax.tree.leaves(state), (metrics["loss"], metrics["grad_norm"])

    data = [batch(i, shape, T, B, mesh, P(time_axis, data_axis), P(data_axis)) for i in range(2)]
    start = time.perf_counter()
    compiled = step.lower(leaves, *data[0]).compile()
    compile_s = time.perf_counter() - start
    row = dict(peak_mb=peak_mb(compiled), compile_s=compile_s)
    leaves, (loss, norm) = compiled(leaves, *data[0])
    row |= dict(loss=float(loss)) | (dict(grad_norm=float(norm)) if name == "small-net" else {})
    if want is not None:
        same((row["loss"], row["grad_norm"]), (want["loss"], want["grad_norm"]), 1e-4)
    if CPU:
        return row | {"functional_check_only": True}

    def only_loss(leaves, *data):
        leaves, (loss, _) = compiled(leaves, *data)
        return leaves, loss

    (ms, low, high), losses, _ = timed(only_loss, leaves, data)
    return row | dict(ms=ms, quartiles=[low, high], samples_per_s=B / ms * 1e3, losses=[round(x, 4) for x in losses])


def batch(seed, shape, T, B, mesh, along, of_labels):
    """Random (xs, labels), made where they are wanted: spikes for an image, current for the stack."""
    sharded = lambda spec: NamedSharding(mesh, spec)

    @partial(jax.jit, out_shardings=(sharded(along), sharded(of_labels)))
    def draw():
        keys = jax.random.split(jax.random.key(seed))
        labels = jax.random.randint(keys[1], (B,), 0, 10)
        if len(shape) == 1:
            return jax.random.normal(keys[0], (T, B, *shape)), labels
        return jax.random.bernoulli(keys[0], 0.5, (T, B, *shape)), labels

    return draw()


def data(n, small, how):
    """Weak scaling (a part of the batch for each device) and strong (all of it for all)."""
    T, part, whole = (8, 2, 4 * n) if small else (32, 100, 200)
    training("resnet18", {"data": n}, T, part * n, how)
    if n > 1:
        training("resnet18", {"data": n}, T, part * n, how, sums="bfloat16")
    if part * n != whole and whole % n == 0:
        training("resnet18", {"data": n}, T, whole, how)


def synchronised(n, small, how):
    """Batch statistics of the whole batch."""
    training("resnet18", {"data": n}, *((8, 2 * n) if small else (32, 100 * n)), how, synchronised=True)


def over_time(n, small, how, name, steps):
    for T in (8 * n, 16 * n) if small else steps:  # a word of packed spikes is on one device
        training(name, {"time": n}, T, 4 if small else 16, how)


def largest(n, how):
    """The stack with T doubled until it does not fit."""
    for T in (2**i for i in range(13, 20)):
        if training("lif-stack", {"time": n}, T, 16, how) is None:
            return


def equal(n, small, how):
    """Every mesh of n devices gives what one gives."""
    T, B = (16, 8) if small else (32, 64)
    one = training("small-net", {"data": 1}, T, B, how, synchronised=True)
    meshes = [{"data": n}, {"time": n}, {"data": 2, "time": n // 2}] if n >= 4 else [{"data": n}, {"time": n}]
    for axes in meshes:
        training("small-net", axes, T, B, how, synchronised=True, want=one)


def each_in_a_process(args):
    for n in map(int, args.devices.split(",")):
        env = lambda i, n=n: os.environ | {"SNNFUSE_PROCESS": f"{i} of {n}", "CUDA_VISIBLE_DEVICES": str(i)}
        command = [sys.executable, *sys.argv, "--devices", str(n)]
        running = [subprocess.Popen(command, env=env(i)) for i in range(n)]
        while any(p.poll() is None for p in running):
            time.sleep(0.1)
            if any(p.poll() for p in running):  # the others would wait for it
                for p in running:
                    p.terminate()
        if any(p.returncode for p in running):
            sys.exit(f"{n} processes ended with {[p.returncode for p in running]}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", default="1,2,4,8", help="counts to measure, of those that there are")
    parser.add_argument("--only", default="links,lanes,equal,data,synchronised,stack,time,largest")
    parser.add_argument("--T", default="32,512,4096", help="of time over devices")
    parser.add_argument("--small", action="store_true", help="small cases, which a CPU can run")
    parser.add_argument("--implementation", default=None)
    parser.add_argument(
        "--processes", action="store_true", help="one for each device, which has a host thread of its own"
    )
    args = parser.parse_args()
    if args.processes and not process:
        return each_in_a_process(args)
    small, how, only = args.small, args.implementation, args.only.split(",")
    steps = [int(T) for T in args.T.split(",")]
    cases = {
        "links": lambda n: n > 1 and links(n, small),
        "lanes": lambda n: lanes(n, small, how),
        "equal": lambda n: n > 1 and equal(n, small, how),
        "data": lambda n: data(n, small, how),
        "synchronised": lambda n: n > 1 and synchronised(n, small, how),
        "stack": lambda n: over_time(n, small, how, "lif-stack", steps),
        "time": lambda n: over_time(n, small, how, "resnet18", steps),
        "largest": lambda n: small or largest(n, how),
    }
    if unknown := [name for name in only if name not in cases]:
        parser.error(f"--only must name some of {', '.join(cases)}; got {unknown[0]}")
    for n in map(int, args.devices.split(",")):
        if n <= jax.device_count():
            for name in only:
                cases[name](n)


if __name__ == "__main__":
    main()
