"""Several devices of one host: the links, sharded `jit`, data parallel steps and the time pipeline, each checked, then timed.

    python benchmarks/multi_gpu.py [--devices 1,2,4,8] [--small]        rows go to results/multi_gpu.jsonl

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python benchmarks/multi_gpu.py --small      on a CPU

On simulated CPU devices it is a check that everything runs and is right, and the rows say so and hold no times: they
share the same cores. `links` gives what `snnfuse.parallel.plan.Machine` wants: seconds and bytes per second of one
all-reduce and of one hand-over. Weak scaling: the work of a device stays; strong: the work of all stays.
"""

import argparse
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P
from measure import fwd_bwd, normal_like, record, time_ms

import snnfuse as sf
from snnfuse import nn, parallel

CPU = jax.default_backend() == "cpu"


def row(case, devices, f, *args, **more):
    """Run f(*args), and time it where a time means something."""
    try:
        jax.block_until_ready(f(*args))
        ms, low, high = (None,) * 3 if CPU else time_ms(f, *args)
    except Exception as e:  # a failure is a row
        record("multi_gpu", case=case, devices=devices, status=f"{type(e).__name__}: {str(e)[:200]}", **more)
        return None
    kind = {"functional_check_only": True} if CPU else {"ms": ms, "quartiles": [low, high]}
    record("multi_gpu", case=case, devices=devices, status="ok", **kind, **more)
    return ms


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
        row("all-reduce", n, reduce, x, bytes=size)
        row("hand-over", n, hand, x, bytes=size)


def lanes(n, small, implementation):
    """`unroll`, forward and backward, by jit alone: weak scaling over lanes."""
    T, M = (8, 2**10) if small else (32, 2**21)
    mesh = parallel.make_mesh({"data": n})
    run = fwd_bwd(lambda d, xs: sf.unroll(sf.LIF(), sf.LIFParams(d, 1.0), None, xs, implementation=implementation))
    decay, xs = jnp.float32(0.6), jax.random.normal(jax.random.key(0), (T, n, M))
    cotangents = normal_like(jax.eval_shape(lambda: run_shape(decay, xs)))
    specs = P(None, "data"), P("data")
    args = (parallel.shard(decay, mesh), parallel.shard(xs, mesh, specs[0]))
    d = parallel.shard(cotangents[0], mesh, specs[0]), parallel.shard(cotangents[1], mesh, specs[1])
    if small or n == 1:
        same(run(args, d), fwd_bwd(run_shape)((decay, xs), cotangents), 1e-4)
    compiled = run.lower(args, d).compile().as_text()
    assert "all-gather" not in compiled, "a sequence was gathered"
    row("unroll, weak", n, run, args, d, T=T, lanes_a_device=M, implementation=implementation or "the default")


def run_shape(decay, xs):
    return sf.unroll(sf.LIF(), sf.LIFParams(decay, 1.0), None, xs, implementation="scan")


def network(width, axes, microbatches, implementation):
    rngs = nnx.Rngs(0)
    how = {"implementation": implementation}
    model = nn.Sequential(
        nnx.Conv(2, width, (3, 3), strides=(2, 2), use_bias=False, rngs=rngs),
        nnx.BatchNorm(width, rngs=rngs),
        nn.LIF(tau=2.0, **how),
        nnx.Conv(width, 2 * width, (3, 3), strides=(2, 2), use_bias=False, rngs=rngs),
        nnx.BatchNorm(2 * width, rngs=rngs),
        nn.LIF(tau=2.0, **how),
        nn.flatten,
        nnx.Linear(2 * width * 64, 10, rngs=rngs),
        nn.LI(tau=4.0, **how),
    )
    if axes:
        parallel.synchronise_batch_norm(model, axes)
    if "time" in axes:
        parallel.over_time(model, microbatches=microbatches)
    return nnx.split(model)


def train_step(graphdef, over_time, state, batch):
    xs, labels = batch

    def loss_of(model):
        outs = model(xs)[0]
        logits = parallel.readout(nn.membrane_mean, outs) if over_time else nn.membrane_mean(outs)
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1).mean()

    model = nnx.merge(graphdef, state)
    loss, grads = nnx.value_and_grad(loss_of)(model)
    grads = parallel.mean(grads)
    nnx.update(model, jax.tree.map(lambda p, g: p - 0.1 * g, nnx.state(model, nnx.Param), grads))
    return nnx.state(model), {"loss": loss}


def training(axes, microbatches, T, B, small, implementation, case, want=None):
    """A training step on a mesh; its loss must be that of one device, `want`."""
    mesh = parallel.make_mesh(axes)
    time, data = ("time" if "time" in axes else None), ("data" if "data" in axes else None)
    graphdef, state = network(4 if small else 64, tuple(axes), microbatches, implementation)
    step = jax.jit(
        parallel.data_parallel(partial(train_step, graphdef, bool(time)), mesh, batch=(P(time, data), P(data)))
    )
    keys = jax.random.split(jax.random.key(1))
    xs = parallel.shard(jax.random.normal(keys[0], (T, B, 32, 32, 2)), mesh, P(time, data))
    labels = parallel.shard(jax.random.randint(keys[1], (B,), 0, 10), mesh, P(data))
    state = parallel.shard(state, mesh)
    loss = float(step(state, (xs, labels))[1]["loss"])
    assert want is None or abs(loss - want) < 1e-3 * abs(want), f"loss {loss}, on one device {want}"
    what = dict(T=T, batch=B, mesh=axes, microbatches=microbatches, implementation=implementation or "the default")
    row(case, mesh.size, step, state, (xs, labels), loss=loss, **what)
    return loss


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", default=None, help="counts to measure, 1,2,4,8 or those there are")
    parser.add_argument("--small", action="store_true", help="small cases, which a CPU can run")
    parser.add_argument("--implementation", default=None)
    args = parser.parse_args()
    counts = [int(n) for n in args.devices.split(",")] if args.devices else [1, 2, 4, 8]
    counts = [n for n in counts if n <= jax.device_count()]
    how = args.implementation
    T, B = (8, 8) if args.small else (32, 64)
    one = training({"data": 1}, None, T, B, args.small, how, "data, strong")
    long = training({"data": 1}, None, 4 * T, B, args.small, how, "time, strong")
    for n in counts:
        if n > 1:
            links(n, args.small)
            training({"data": n}, None, T, B, args.small, how, "data, strong", want=one)
            for m in (1, n, 2 * n):
                if B % m == 0:
                    training({"time": n}, m, 4 * T, B, args.small, how, "time, strong", want=long)
        lanes(n, args.small, how)
        training({"data": n}, None, T, n * B, args.small, how, "data, weak")
        training({"time": n}, n if n > 1 else None, n * T, B, args.small, how, "time, weak")
        if n >= 4:
            mixed = {"data": 2, "time": n // 2}
            training(mixed, n // 2, 4 * T, B, args.small, how, "data x time, strong", want=long)


if __name__ == "__main__":
    main()
