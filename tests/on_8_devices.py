"""Tests that need 8 devices, simulated on a CPU; tests/test_parallel.py runs this file in a process of its own.

XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m pytest tests/on_8_devices.py
"""

import dataclasses
import math
import re
from functools import cache, partial

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import triton_on_numpy
from compare import assert_close, assert_fires, assert_same_spikes
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from small_network import CLASSES, B, T, images, network, train_step
from test_train import TINY, rows, train, without_pictures

import snnfuse as sf
from snnfuse import nn, papers, parallel, training
from snnfuse.core.compose import Twice
from snnfuse.ops import triton

IMPLEMENTATIONS = ("scan", "interpret")
MOVES = re.compile(r" = (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")


def collectives(compiled) -> list[tuple[str, tuple[int, ...]]]:
    """(operation, shape) of every array that a compiled program moves between devices."""
    found = []
    for shapes, name in MOVES.findall(compiled.as_text()):
        found += [(name, tuple(map(int, s.split(",") if s else ()))) for s in re.findall(r"\w\d+\[([\d,]*)\]", shapes)]
    return found


def test_there_are_8_devices():
    assert jax.device_count() == 8


# ---- plain jit with NamedSharding

LANES = (4, 2, 16)
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
SPLITS = [
    ("affine", P(None, "a"), AUTO),
    ("affine", P(None, "a", None, "b"), AUTO),
    ("affine", P(None, None, None, ("a", "b")), EXPLICIT),
    ("adaptive", P(None, ("b", "a")), AUTO),
    ("adaptive", P(None, "a", None, "b"), EXPLICIT),
]


def pulled_back(neuron, implementation):
    def f(params, state, xs, cotangents):
        out, vjp = jax.vjp(partial(sf.unroll, neuron, implementation=implementation), params, state, xs)
        return out, vjp(cotangents)

    return f


@cache
def reference(name, T=6, lanes=LANES):
    """The case, the cotangents of its outputs and final state, and what scan gives on one device."""
    case = cases.make(name, T=T, lanes=lanes)
    args = case.params, case.state, case.xs
    cotangents = cases.cotangents(jax.eval_shape(partial(sf.unroll, case.neuron, implementation="scan"), *args))
    return case, cotangents, jax.jit(pulled_back(case.neuron, "scan"))(*args, cotangents)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name, spec, kind", SPLITS, ids=str)
def test_jit_splits_lanes_without_moving_them(name, implementation, spec, kind):
    case, cotangents, want = reference(name)
    assert_fires(want[0][0])

    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind,) * 2)
    if spec[1] == ("b", "a"):
        mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(kind,) * 2, devices=jax.devices()[:4])
    put = lambda tree, spec: jax.device_put(tree, NamedSharding(mesh, spec))
    over_lanes = P(*spec[1:])
    args = put(case.params, P()), put(case.state, over_lanes), put(case.xs, spec)
    cotangents = put(cotangents[0], spec), put(cotangents[1], over_lanes)
    compiled = jax.jit(pulled_back(case.neuron, implementation)).lower(*args, cotangents).compile()
    got = compiled(*args, cotangents)

    assert_same_spikes(got[0][0], want[0][0])
    assert_close(got, want, rtol=case.rtol)
    largest = max(p.size for p in jax.tree.leaves(case.params))
    for operation, shape in collectives(
        compiled
    ):  # only gradients of params may move; with explicit axes they end replicated
        assert math.prod(shape) <= largest, (operation, shape)
        assert operation == "all-reduce" or kind == EXPLICIT, (operation, shape)
    (outs, _), (_, _, d_xs) = got
    for leaf in (outs, *jax.tree.leaves(d_xs)):
        assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, spec), leaf.ndim)


def test_shard_map_with_its_checks():
    """JAX's own `shard_map` tracks which values vary over devices, and sums the gradient of a shared parameter itself."""
    case = cases.make("lif", T=6, lanes=(8, 16))
    loss = lambda decay, xs: sf.unroll(case.neuron, sf.LIFParams(decay), None, xs, implementation="scan")[0].mean()
    step = lambda decay, xs: jax.value_and_grad(lambda d: jax.lax.pmean(loss(d, xs), "data"))(decay)
    mesh = parallel.make_mesh("data=8")
    got = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(P(), P(None, "data")), out_specs=P()))(0.7, case.xs)
    assert_close(got, jax.value_and_grad(loss)(0.7, case.xs), rtol=1e-5)


@pytest.mark.parametrize("implementation, kind", [("scan", AUTO), ("triton", AUTO), ("triton", EXPLICIT)])
def test_a_recurrent_layer_splits_its_samples(implementation, kind, monkeypatch):
    """Every device has the whole weight and its own samples; only gradients of shared arrays move.

    In place of the kernels runs a stand-in that mixes all of its arguments: it must be given one device's part of them.
    """

    def called(kernel, args, shapes, *_):
        mixed = sum(a.astype(jnp.float32).sum() for a in args if not isinstance(a, int))
        return [jnp.broadcast_to(mixed, s.shape).astype(s.dtype) for s in shapes]

    monkeypatch.setattr(triton, "why_not_here", lambda: None)
    triton_on_numpy.install(monkeypatch, called=called)
    monkeypatch.setattr(triton, "kernel", lambda text, name: name)
    case = cases.make("lif", T=5, lanes=(8, 6))
    weight = jax.random.normal(jax.random.key(0), (2, 3, 3))

    def gradients(implementation, weight, xs):
        def loss(weight, xs):
            layer = nn.Recurrent(nn.LIF(decay=0.7, implementation=implementation), 6, heads=2, rngs=nnx.Rngs(0))
            layer.weight[...] = weight
            return (layer(xs)[0] * jax.lax.stop_gradient(xs)).sum()

        return jax.value_and_grad(loss, (0, 1))(weight, xs)

    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    put = lambda a, *spec: jax.device_put(a, NamedSharding(mesh, P(*spec)))
    args = put(weight), put(case.xs, None, "data")
    compiled = jax.jit(partial(gradients, implementation)).lower(*args).compile()
    got = compiled(*args)
    if implementation == "scan":
        assert_close(got, gradients("scan", weight, case.xs), 1e-5)
    assert got[1][1].sharding.is_equivalent_to(args[1].sharding, 3)
    assert all(kind == "all-reduce" and math.prod(shape) <= weight.size for kind, shape in collectives(compiled))


# ---- a network, on one device and on many


def without_grads(*args):
    state, metrics = train_step(*args)
    return state, {"loss": metrics["loss"], "correct": metrics["correct"]}


def run(step, state, batch, steps=3):
    rows = []
    for _ in range(steps):
        state, metrics = step(state, batch)
        rows.append(metrics)
    return rows, state


@cache
def one_device(readout=nn.membrane_mean):
    graphdef, state = network()
    return run(jax.jit(partial(train_step, graphdef, readout)), state, images())


def on_mesh(text, readout=nn.membrane_mean, synchronised=True, implementation="scan", step=train_step):
    mesh = parallel.make_mesh(text)
    axes = tuple(mesh.axis_names) if synchronised else ()
    graphdef, state = network(axes, implementation)
    data = "data" if "data" in mesh.axis_names else None
    time = "time" if "time" in mesh.axis_names else None
    read = (lambda outs: parallel.readout(readout, outs)) if time else readout
    step = parallel.data_parallel(partial(step, graphdef, read), mesh, batch=(P(time, data), P(data)))
    return jax.jit(step), state


@pytest.mark.parametrize(
    "text, readout, implementation",
    [
        ("data=8", nn.membrane_mean, "interpret"),
        ("time=4", nn.membrane_max, "scan"),
        ("data=2,time=4", nn.membrane_mean, "interpret"),
        ("data=4,time=2", nn.membrane_last, "scan"),
    ],
)
def test_a_mesh_trains_as_one_device(text, readout, implementation):
    want, want_state = one_device(readout)
    step, state = on_mesh(text, readout, implementation=implementation)
    got, got_state = run(step, state, images())
    assert want[-1]["loss"] < want[0]["loss"]
    for a, b in zip(got, want, strict=True):
        assert int(a["correct"]) == int(b["correct"])
        assert_close((a["loss"], a["grads"]), (b["loss"], b["grads"]), rtol=1e-4)
    assert_close(got_state, want_state, rtol=1e-4)


def test_the_network_fires():
    model = nnx.merge(*network())
    spikes = nn.Sequential(*model.layers[:3])(images()[0])[0]
    assert_fires(spikes)


# ---- what moves


def size_of(shapes):
    return sum(math.prod(s) for s in shapes)


def test_data_parallel_moves_the_gradients_once():
    step, state = on_mesh("data=8", synchronised=False, step=without_grads)
    moved = collectives(step.lower(state, images()).compile())
    params = [p.size for p in jax.tree.leaves(nnx.filter_state(state, nnx.Param))]
    stats = [p.size for p in jax.tree.leaves(nnx.filter_state(state, nnx.BatchStat))]
    assert {operation for operation, _ in moved} == {"all-reduce"}
    assert size_of(shape for _, shape in moved) == sum(params) + sum(stats) + 2, "and two metrics"


def test_time_over_devices_moves_the_states_and_nothing_of_size_T():
    """T is 32 times as long as every other axis, so an array with a time axis would be seen by its size."""
    step, state = on_mesh("time=4")
    moved = collectives(step.lower(state, images(T=512)).compile())
    params = sum(p.size for p in jax.tree.leaves(nnx.filter_state(state, nnx.Param)))
    handed = [shape for operation, shape in moved if operation == "collective-permute"]
    states = [(B, 4, 4, 4), (B, CLASSES)]
    assert sorted(handed) == sorted(3 * states), "v of each layer: forward in a loop; backward once, then in a loop"
    reduced = [shape for operation, shape in moved if operation == "all-reduce"]
    assert len(handed) + len(reduced) == len(moved)
    assert max(map(math.prod, reduced)) <= params and size_of(reduced) < 3 * params + B * CLASSES * 4


def test_time_over_devices_divides_the_memory():
    """Each of four devices holds a quarter of the temporary arrays of a step with T = 512, so longer sequences fit."""
    T, mib = 512, 2**20
    xs, labels = images(T=T)
    graphdef, state = network()
    alone = jax.jit(partial(without_grads, graphdef, nn.membrane_mean)).lower(state, (xs, labels)).compile()
    step, state = on_mesh("time=4", step=without_grads)
    spread = step.lower(state, (parallel.shard(xs, parallel.make_mesh("time=4"), P("time")), labels)).compile()
    alone, spread = (c.memory_analysis().temp_size_in_bytes / mib for c in (alone, spread))
    assert spread < alone / 2, f"{alone:.1f} MiB alone, {spread:.1f} on each of four"


# ---- the rounds themselves


def over_time(G, neuron, check_vma=False, **options):
    """`unroll` of whole arrays, with time over G devices."""
    return jax.shard_map(
        partial(parallel.unroll_over_time, neuron, **options),
        mesh=parallel.make_mesh({"time": G}),
        in_specs=(P(), P(), P("time")),
        out_specs=(P("time"), P()),
        check_vma=check_vma,
    )


@partial(jax.jit, static_argnums=0)
def with_gradients(f, args, cotangents):
    out, vjp = jax.vjp(f, *args)
    return out, vjp(cotangents)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("G", [1, 2, 4, 8])
@pytest.mark.parametrize("name, lanes", [("adaptive", (8, 3)), ("outputs", (4, 2, 5)), ("affine", (6,))])
def test_time_over_devices_is_unroll(name, lanes, G, implementation):
    """Every output and gradient, with an initial state, parameters of every shape, and cotangents of the final state."""
    case, cotangents, want = reference(name, 16, lanes)
    args = case.params, case.state, case.xs
    got = with_gradients(over_time(G, case.neuron, implementation=implementation), args, cotangents)
    spikes = jax.tree.leaves(want[0][0])[0]
    assert_fires(spikes)
    assert_same_spikes(jax.tree.leaves(got[0][0])[0], spikes)
    assert_close(got, want, rtol=case.rtol)


def test_time_over_devices_in_a_shard_map_with_its_checks():
    """The checks of `shard_map` are on. The interpreter of Pallas does not pass them, so scan runs."""
    case, cotangents, want = reference("adaptive", 16, (8, 3))
    args = case.params, case.state, case.xs
    got = with_gradients(over_time(4, case.neuron, check_vma=True, implementation="scan"), args, cotangents)
    assert_close(got, want, rtol=case.rtol)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("used", ["outputs", "final state"])
def test_time_over_devices_of_what_is_used(used, implementation):
    """The first state is the neuron's own, the parameters are numbers, and the loss uses only the outputs or the final state."""
    case = cases.make("lif", T=16, lanes=(8, 5))
    read = lambda out: out[used == "final state"]
    run = lambda unroll, xs: read(unroll(sf.LIFParams(0.7, 1.0), None, xs))
    scan = partial(run, partial(sf.unroll, case.neuron, implementation="scan"))
    cotangents = cases.cotangents(jax.eval_shape(scan, case.xs))
    spread = partial(run, over_time(4, case.neuron, implementation=implementation))
    got, want = (with_gradients(f, (case.xs,), cotangents) for f in (spread, scan))
    assert_close(got, want, rtol=1e-5)


def packed(kind, T, lanes):
    """(the neuron with its spikes as numbers, which carry the gradient, and as bits; out_dtype; params, state, xs)"""
    case = cases.make("lif", T=T, lanes=lanes)
    if kind == "graded":
        args = papers.TernaryLIFParams(), papers.TernaryLIFState(case.state.v), case.xs - 0.5
        return Twice(papers.TernaryLIF()), (jnp.float32, sf.Packed(8, -1, 1)), args
    return Twice(case.neuron), (jnp.float32, sf.Packed(8)), (case.params, case.state, case.xs)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", [AUTO, EXPLICIT])
def test_jit_splits_graded_packed_spikes(kind, implementation):
    neuron, out_dtype, args = packed("graded", 20, (8, 4))
    run = jax.jit(partial(sf.unroll, neuron, implementation=implementation, out_dtype=out_dtype))
    want = jax.jit(partial(sf.unroll, neuron, implementation="scan", out_dtype=out_dtype))(*args)
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind,) * 2)
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec, "a", "b")))
    got = run(args[0], jax.tree.map(put, args[1]), put(args[2], None))
    assert len(np.unique(want[0][0])) == 3
    jax.tree.map(np.testing.assert_array_equal, got[0], want[0])
    assert all(w.sharding.spec[1:] == ("a", "b") for w in got[0][1])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["binary", "graded"])
def test_packed_spikes_over_time(kind, implementation):
    """Packed spikes are compared beside the spikes as numbers, which carry the gradient."""
    neuron, out_dtype, args = packed(kind, 32, (8, 5))
    run = lambda unroll, *args: (lambda outs, final: ((outs[0], final), outs[1]))(*unroll(*args))

    @partial(jax.jit, static_argnums=0)
    def gradients(unroll, *args):
        out, vjp, words = jax.vjp(partial(run, unroll), *args, has_aux=True)
        return out, words, vjp(cases.cotangents(out))

    got = gradients(over_time(4, neuron, implementation=implementation, out_dtype=out_dtype), *args)
    want = gradients(partial(sf.unroll, neuron, implementation="scan", out_dtype=out_dtype), *args)
    assert_fires(want[0][0] != 0)
    jax.tree.map(np.testing.assert_array_equal, got[1], want[1])
    assert_close((got[0], got[2]), (want[0], want[2]), rtol=1e-5)


def test_time_over_devices_is_bit_equal_where_nothing_is_reduced():
    case = cases.make("lif", T=16, lanes=(8, 16))
    got = jax.jit(over_time(8, case.neuron, implementation="scan"))(case.params, case.state, case.xs)
    want = sf.unroll(case.neuron, *case[1:4])
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)


# ---- mean, random keys, batch statistics, pmap


@pytest.mark.parametrize("last, piece, sums", [(1, 1, 4), (24, 2**26, 2), (2**22, 2**26, 1)])
@pytest.mark.parametrize("n, moved_by", [(8, "psum"), (2, "ppermute")])
def test_mean_joins_and_changes_nothing(n, moved_by, last, piece, sums, monkeypatch):
    """Values (one is NaN) and dtypes stay the same. The float32 leaves are summed in as many collectives as there are pieces."""
    monkeypatch.setattr(parallel.step, "LAST", last)
    monkeypatch.setattr(parallel.step, "PIECE", piece)
    draw = lambda i, shape: jax.random.normal(jax.random.key(i), (n, *shape))
    tree = {
        "a": [draw(0, (2, 3)), draw(1, ()), draw(5, (0,)), None],
        "b": [draw(2, (5,)), draw(3, (4, 1)).astype(jnp.bfloat16), draw(4, (7,)), jnp.arange(2 * n).reshape(n, 2)],
    }
    tree["b"][2] = tree["b"][2].at[1, 0].set(jnp.nan)  # the first number of the first sum, on one of the devices
    here = partial(
        jax.shard_map, mesh=parallel.make_mesh(f"data={n}"), in_specs=P("data"), out_specs=P(), check_vma=False
    )
    whole = lambda f: jax.jit(here(lambda tree: f(jax.tree.map(lambda x: x[0], tree))))
    got, want = whole(parallel.mean_gradients)(tree), whole(lambda tree: jax.lax.pmean(tree, "data"))(tree)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    assert np.isnan(got["b"][2][0]) and np.isfinite(got["b"][2][1:]).all() and np.isfinite(got["a"][0]).all()
    jaxpr = str(jax.make_jaxpr(whole(parallel.mean_gradients))(tree))
    assert jaxpr.count(moved_by) == sums + 1 + (n == 8)  # 1 of bfloat16, 1 of integers


def test_mean_in_bfloat16_is_that_of_float32_to_its_rounding():
    """Every float comes back in its own dtype, and integers stay exact."""
    tree = {"a": jax.random.normal(jax.random.key(0), (8, 300)), "n": jnp.arange(16).reshape(8, 2)}
    here = partial(jax.shard_map, mesh=parallel.make_mesh("data=8"), in_specs=P("data"), out_specs=P(), check_vma=False)
    whole = lambda **how: jax.jit(here(lambda tree: parallel.mean_gradients(jax.tree.map(lambda x: x[0], tree), **how)))
    got, want = whole(dtype=jnp.bfloat16)(tree), whole()(tree)
    assert [x.dtype for x in jax.tree.leaves(got)] == [x.dtype for x in jax.tree.leaves(want)]
    np.testing.assert_array_equal(got["n"], want["n"])
    error = np.abs(got["a"] - want["a"])  # a rounding of each, and of each sum
    assert error.max() > 0 and (error <= 8 * 2**-9 * np.abs(tree["a"]).mean(0)).all()


def test_adam_flattened_as_the_gradients_are_summed_gives_one_device_s_parameters(monkeypatch):
    monkeypatch.setattr(parallel.step, "LAST", 2**9)
    xs, w = jax.random.normal(jax.random.key(0), (16, 4)), jax.random.normal(jax.random.key(1), (4, 32))
    params = {"a": w, "b": w.T * 0.1, "c": jnp.ones(5)}
    assert len(parallel.step._pieces(jax.tree.leaves(params))) == 2

    def step(optimizer, state, xs):
        params, moments = state
        loss_of = lambda p: jnp.square(jnp.tanh(xs @ p["a"]) @ p["b"]).mean() + p["c"].sum() ** 2
        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, moments = optimizer.update(parallel.mean_gradients(grads), moments, params)
        return (optax.apply_updates(params, updates), moments), {"loss": loss}

    def trained(optimizer, step):
        state = params, optimizer.init(params)
        for _ in range(3):
            state, _ = step(state, xs)
        return state

    adam, mesh = optax.adamw(1e-2), parallel.make_mesh("data=8")
    flat = parallel.flatten_optimizer(adam)
    want, _ = trained(adam, jax.jit(partial(step, adam)))
    got, moments = trained(flat, jax.jit(parallel.data_parallel(partial(step, flat), mesh)))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert len(jax.tree.leaves(moments)) == 1 + 2 * 2  # the count, and two moments of two pieces


def test_statistics_on_a_mesh_with_explicit_axes():
    xs = jax.random.normal(jax.random.key(0), (4, 8, 3)) + 5
    mesh = jax.make_mesh((8,), ("data",), axis_types=(EXPLICIT,))
    norm = nn.BatchNorm(3, rngs=nnx.Rngs(0))
    gradient = lambda xs: jax.grad(lambda xs: (nnx.clone(norm)(xs) ** 3).mean())(xs)
    want = jax.jit(gradient)(xs)
    with jax.set_mesh(mesh):
        got = jax.jit(gradient)(jax.device_put(xs, NamedSharding(mesh, P(None, "data"))))
    assert_close(jax.device_get(got), want, rtol=1e-4)


def test_statistics_of_padded_sequences_weigh_devices_by_their_steps():
    """Synchronised over four devices, whose sequences have different lengths, as on one device; gradients too."""
    xs, lengths = jax.random.normal(jax.random.key(0), (6, 8, 3)) + 5, jnp.array([6, 1, 3, 2, 5, 1, 1, 4])
    real = jnp.arange(6)[:, None, None] < lengths[:, None]
    cotangent = jnp.where(real, jax.random.normal(jax.random.key(1), xs.shape), 0)

    def run(xs, lengths, cotangent, axis_name=None):
        make = lambda: nn.BatchNorm(3, axis_name=axis_name, rngs=nnx.Rngs(0))
        outs, vjp = jax.vjp(lambda xs: make()(nn.Padded(xs, lengths)).values, xs)
        return outs, vjp(cotangent)[0]

    mesh, over = parallel.make_mesh("data=4"), P(None, "data")
    options = dict(mesh=mesh, in_specs=(over, P("data"), over), out_specs=(over, over))
    got = jax.jit(jax.shard_map(partial(run, axis_name="data"), **options))(xs, lengths, cotangent)
    assert_close(jax.device_get(got), run(xs, lengths, cotangent), rtol=1e-4)


def test_every_device_has_its_own_keys_and_the_state_keeps_its_own():
    def step(state, batch, key):
        return {"key": state["key"]}, {"draw": jax.random.uniform(key) + jax.random.uniform(state["key"])}

    key, own = jax.random.key(3), jax.random.key(4)
    run = jax.jit(parallel.data_parallel(step, parallel.make_mesh("data=4,time=2")))
    state, metrics = run({"key": own}, jnp.zeros(4), key)
    draws = [
        jax.random.uniform(jax.random.fold_in(key, i)) + jax.random.uniform(jax.random.fold_in(own, i))
        for i in range(4)
    ]
    np.testing.assert_allclose(metrics["draw"], np.mean(draws), rtol=1e-6)
    assert len({float(d) for d in draws}) == 4 and state["key"] == own
    assert run({"key": own}, jnp.zeros(4), key)[1] == metrics


def test_statistics_of_each_device_are_averaged():
    step, state = on_mesh("data=4", synchronised=False)
    xs, labels = images()
    new, _ = step(state, (xs, labels))
    graphdef, alone = network()
    one = jax.jit(partial(without_grads, graphdef, nn.membrane_mean))
    parts = [one(alone, (xs[:, i : i + 4], labels[i : i + 4]))[0] for i in range(0, 16, 4)]
    want = jax.tree.map(lambda *s: sum(s) / 4, *[nnx.filter_state(p, nnx.BatchStat) for p in parts])
    assert_close(nnx.filter_state(new, nnx.BatchStat), want, rtol=1e-5)


def test_pmap_still_works_and_does_the_same():
    """JAX 0.10 and 0.12 keep pmap, as shard_map and jit; `pmapped` is for code built on it, with a leading device axis."""
    graphdef, state = network()
    inner = partial(train_step, graphdef, nn.membrane_mean)
    xs, labels = images()
    want_state, want = jax.jit(
        parallel.data_parallel(inner, parallel.make_mesh("data=4"), batch=(P(None, "data"), P("data")))
    )(state, (xs, labels))
    copies = jax.tree.map(lambda x: jnp.stack([x] * 4), state)
    split = jnp.moveaxis(xs.reshape(T, 4, 4, 8, 8, 1), 1, 0), labels.reshape(4, 4)
    got_state, got = parallel.pmapped(inner, devices=jax.devices()[:4])(copies, split)
    for i in range(4):
        on_i = jax.tree.map(lambda x, i=i: x[i], (got_state, got))
        assert_close(on_i, (want_state, want), rtol=1e-6)


# ---- what cannot be


def test_errors_say_what_is_wrong():
    with pytest.raises(ValueError, match="mesh data=3,time=4 needs 12 devices; there are 8"):
        parallel.make_mesh("data=3,time=4")
    step, state = on_mesh("data=8")
    xs, labels = images()
    with pytest.raises(ValueError, match="incompatible devices"):
        step(parallel.shard(state, parallel.make_mesh("data=4")), (xs, labels))
    with pytest.raises(ValueError, match=r"batch\[0\]: axis 1 of shape .* must be a multiple of 8, .*'data'; got 12"):
        step(state, (xs[:, :12], labels[:12]))
    step, state = on_mesh("time=4")
    with pytest.raises(ValueError, match=r"batch\[0\]: axis 0 of shape .* must be a multiple of 4, .*'time'; got 6"):
        step(state, (xs[:6], labels))
    with pytest.raises(ValueError, match="packed outputs need a multiple of 8 steps a device; got 2"):
        over_time(4, sf.LIF(), out_dtype=sf.Packed(8))(sf.LIFParams(), None, jnp.ones((8, 4)))
    with pytest.raises(ValueError, match=r"axis must be one of those that the code runs on, \('time',\); got 'tim'"):
        over_time(4, sf.LIF(), axis="tim")(sf.LIFParams(), None, jnp.ones((8, 4)))
    with pytest.raises(ValueError, match=r"batch .* names the axis 'time'; the mesh has \{'data': 8\}"):
        parallel.data_parallel(lambda *a: a, parallel.make_mesh("data=8"), batch=P("time"))


def test_a_kernel_in_a_shard_map_over_some_axes_is_refused():
    """A kernel would make XLA abort the process there, so scan runs."""
    case = cases.make("lif", T=8, lanes=(8, 16))
    mesh = parallel.make_mesh("data=4,time=2")
    xs = parallel.shard(case.xs, mesh, P("time", "data"))

    def some(implementation):
        run = partial(parallel.unroll_over_time, case.neuron, case.params, case.state, implementation=implementation)
        over = dict(mesh=mesh, in_specs=P("time"), out_specs=P("time"), axis_names={"time"}, check_vma=False)
        return jax.jit(jax.shard_map(lambda xs: run(xs)[0], **over))

    with pytest.raises(NotImplementedError, match=r"needs \['data'\] there too, all axes of the mesh"):
        some("interpret")(xs)
    assert_same_spikes(some("scan")(xs), sf.unroll(case.neuron, *case[1:4], implementation="scan")[0])


def test_vmap_of_a_kernel_keeps_its_lanes_apart():
    case = cases.make("lif", T=6, lanes=(8, 16))
    mesh = parallel.make_mesh("data=8")
    xs = parallel.shard(jnp.stack([case.xs, 2 * case.xs]), mesh, P(None, None, "data"))
    f = jax.jit(jax.vmap(lambda xs: sf.unroll(case.neuron, case.params, None, xs, implementation="interpret")[0]))
    compiled = f.lower(xs).compile()
    assert not collectives(compiled)
    want = jnp.stack([sf.unroll(case.neuron, case.params, None, x, implementation="scan")[0] for x in xs])
    assert_same_spikes(compiled(xs), want)


# ---- compiled steps


@cache
def adam():
    return optax.adam(1e-2)


def objects(axes=()):
    model = nnx.merge(*network(axes))
    metrics = nnx.MultiMetric(accuracy=nnx.metrics.Accuracy(), loss=nnx.metrics.Average("loss"))
    return model, nnx.Optimizer(model, adam(), wrt=nnx.Param), metrics


def compiled_step(mesh=None, **options):
    def step(model, optimizer, metrics, xs, labels):
        def loss_of(model):
            logits = nn.membrane_mean(model(xs)[0])
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), logits

        (loss, logits), grads = nnx.value_and_grad(loss_of, has_aux=True)(model)
        optimizer.update(model, parallel.mean_gradients(grads))
        metrics.update(logits=logits, labels=labels, loss=loss)
        return loss

    return training.compiled_step(step, mesh=mesh, batch=(P(None, "data"), P("data")), **options)


@pytest.mark.filterwarnings("error")
def test_a_compiled_step_on_a_mesh_trains_as_on_one_device():
    """Losses, metrics and every variable agree, for calls and scans, with host arrays and global ones. It compiles once."""
    one, mesh = compiled_step(), parallel.make_mesh("data=4")
    several = compiled_step(mesh, check_finite=True)
    want, got, scanned = objects(), objects("data"), objects("data")
    batch = images()
    placed = parallel.shard(batch[0], mesh, P(None, "data")), parallel.shard(batch[1], mesh, P("data"))
    for _ in range(4):
        assert_close(several(*got, *placed), one(*want, *batch), rtol=1e-4)
    several.scan(*scanned, *(np.stack([x] * 4) for x in batch))
    several.check()
    for other in (got, scanned):
        assert_close(nnx.state(other[:2]), nnx.state(want[:2]), rtol=1e-4)
        assert_close(other[2].compute(), want[2].compute(), rtol=1e-4)
        for leaf in jax.tree.leaves(nnx.state(other)):
            assert leaf.sharding.is_fully_replicated and len(leaf.addressable_shards) == 4
    with (
        pytest.warns(UserWarning, match="compiled again"),
        pytest.raises(ValueError, match="axis 1 .* a multiple of 4"),
    ):
        several(*got, *images(B=6))


def test_a_compiled_step_on_a_mesh_has_noise_and_data_of_its_own_on_every_device():
    mesh = parallel.make_mesh("data=4")
    data = training.DeviceData(np.arange(64, dtype=np.uint8), 8, seed=3)
    alone = training.DeviceData(np.arange(64, dtype=np.uint8), 8, seed=3)
    rngs = nnx.Rngs(dropout=0)

    def step(data, rngs, key):
        batch, own = data.next()
        draws = jnp.stack([jax.random.uniform(k) for k in (own, key, rngs.dropout())])
        total = batch.astype(jnp.int32).sum()
        return total, draws.mean(), {str(i): jnp.square(d) for i, d in enumerate(draws)}, draws

    several, one = training.compiled_step(step, mesh=mesh), training.compiled_step(step)
    for i in range(3):
        key = jax.random.key(i)
        total, _, squares, draws = several(data, rngs, key)
        want, *_ = one(alone, nnx.Rngs(dropout=0), key)
        assert total == want  # the same batch, cut into parts
        for square, mean in zip(squares.values(), draws, strict=True):
            assert square > mean**2 + 1e-4, "the devices drew the same number"
    assert data.position[...] == 3 and rngs.dropout.count[...] == 3
    with pytest.raises(ValueError, match="batch must be a multiple of the 4 devices; got 6"):
        training.compiled_step(step, mesh=mesh)(training.DeviceData(np.arange(64), 6), rngs, jax.random.key(0))


def test_a_metric_that_does_not_add_up_over_a_mesh_is_refused():
    step = training.compiled_step(lambda metric, x: metric.update(values=x), mesh=parallel.make_mesh("data=2"))
    with pytest.raises(NotImplementedError, match="only sums add up, .* got a Welford"):
        step(nnx.metrics.Welford(), jnp.ones(4))


# ---- the experiment


@pytest.mark.filterwarnings("default")  # Orbax has its own
def test_the_experiment_trains_on_a_mesh_as_on_one_device(tmp_path, monkeypatch):
    """Without noise the losses equal those of one device. A checkpoint can be resumed on another mesh, or without a mesh."""
    without_pictures(monkeypatch)
    data = dataclasses.replace(TINY.data, encoding="direct", shift=0)
    config = dataclasses.replace(TINY, data=data, steps=6, eval_every=3, out=str(tmp_path))
    losses = lambda name: [row.get("loss", row.get("eval_loss")) for row in rows(tmp_path / name)]
    train.train(dataclasses.replace(config, name="one"))
    part = dataclasses.replace(config, name="part", mesh="data=8", stop_at=4)
    with pytest.raises(train.Stopped, match="stopped after step 4"):
        train.train(part)
    train.train(dataclasses.replace(part, stop_at=None, resume=True, mesh="data=2"))
    assert len(losses("one")) == 8
    np.testing.assert_allclose(losses("part"), losses("one"), rtol=1e-3)
    for mesh, message in (
        ("data=16", "--mesh data=16: mesh data=16 needs 16 devices; there are 8"),
        ("data=3", "--batch must be a multiple of the 3 devices"),
        ("time=2", "--mesh must be data=N"),
        ("eight", "mesh must be like data=4"),
    ):
        with pytest.raises(train.Stopped, match=message):
            train.train(dataclasses.replace(config, name="wrong", mesh=mesh))


def test_after_a_step_of_the_experiment_all_devices_have_the_same_state():
    """This also holds if each device normalises by its own part of the batch."""
    config = dataclasses.replace(TINY, mesh="data=4", sync_batch_norm=False)
    mesh, source = parallel.make_mesh("data=4"), config.data.sources()[0]
    model, optimizer = train.create(config, (28, 28, 1), config.data.classes)
    assert jax.tree.leaves(nnx.state(model, nnx.BatchStat))
    batch = parallel.shard(next(iter(train.in_order(config, source, 32))), mesh, P("data"))
    train.train_step_from_host(config, tuple(batch))(model, optimizer, batch, np.int32(1))
    arrays = jax.tree.leaves(nnx.state((model, optimizer)))
    for array in arrays:
        first, *others = (np.asarray(shard.data) for shard in array.addressable_shards)
        assert len(others) == 3
        for other in others:
            np.testing.assert_array_equal(other, first)
