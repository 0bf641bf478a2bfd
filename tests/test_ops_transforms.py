"""`unroll` under the transformations of JAX and Flax, and with some gradients not wanted: the results are those of scan."""

from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import count

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import assert_close, assert_fires, assert_same_spikes
from flax import nnx

import snnfuse as sf
from snnfuse import nn

pytestmark = pytest.mark.usefixtures("strict")
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["scan", "interpret"])
NEURON = sf.CubaLIF(sf.SoftReset())
T, LANES = 6, (4, 10)  # two chunks of 3 steps in the interpreter


def unroll(implementation, *args):
    return sf.unroll(NEURON, *args, implementation=implementation)


def with_gradients(f, args, cotangents):
    out, vjp = jax.vjp(f, *args)
    return out, vjp(cotangents)


@lru_cache
def problem(seed=0):
    """(params: a scalar, [N] and [*B, N]; state; xs), cotangents of the outputs and of the final state."""
    _, *args, _ = cases.make("cuba", T=T, lanes=LANES, seed=seed)
    return tuple(args), cases.cotangents(jax.eval_shape(partial(unroll, "scan"), *args), seed)


@jax.jit
def plain(args, cotangents):
    return with_gradients(partial(unroll, "scan"), args, cotangents)


def check(got, want):
    """((spikes, final state), gradients of params, state and xs), with any leading axes."""
    (got_out, got_gradients), (want_out, want_gradients) = got, want
    assert_fires(want_out[0])
    assert_same_spikes(got_out[0], want_out[0])
    assert_close(got_out[1], want_out[1], 1e-5)
    assert_close(tuple(got_gradients), tuple(want_gradients), 1e-4)


def stack(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@IMPLEMENTATIONS
def test_eager_jit_and_checkpoint(implementation):
    args, cotangents = problem()
    want = plain(args, cotangents)
    f = partial(unroll, implementation)
    out = f(*args)
    assert_same_spikes(out[0], want[0][0])
    assert_close(out, want[0], 1e-5)

    @jax.jit
    def both(args, cotangents):
        recomputed = jax.checkpoint(f, policy=jax.checkpoint_policies.nothing_saveable)
        return with_gradients(f, args, cotangents), with_gradients(recomputed, args, cotangents)

    kept, recomputed = both(args, cotangents)
    check(kept, want)
    check(recomputed, want)


@lru_cache
def batch(size=3):
    """The arguments and cotangents of some problems, stacked: [size, ...]."""
    return stack([problem(seed) for seed in range(size)])


@IMPLEMENTATIONS
@pytest.mark.parametrize("mapped", ["xs", "params", "everything"])
def test_vmap_of_the_gradient_and_gradient_of_vmap(mapped, implementation):
    axes = {"xs": (None, None, 0), "params": (0, None, None), "everything": (0, 0, 0)}[mapped]
    args, cotangents = batch()
    first = lambda tree, axis: tree if axis == 0 else jax.tree.map(lambda leaf: leaf[0], tree)
    args = tuple(first(a, axis) for a, axis in zip(args, axes, strict=True))

    @jax.jit
    def run(args, cotangents):
        f = partial(unroll, implementation)
        gradient = jax.vmap(lambda cotangents, *args: with_gradients(f, args, cotangents), (0, *axes))(
            cotangents, *args
        )
        return gradient, with_gradients(jax.vmap(f, axes), args, cotangents)

    vmap_of_gradient, gradient_of_vmap = run(args, cotangents)
    pick = lambda tree, i: jax.tree.map(lambda leaf: leaf[i], tree)
    one = lambda i: tuple(pick(a, i) if axis == 0 else a for a, axis in zip(args, axes, strict=True))
    want_out, want_gradients = stack([plain(one(i), pick(cotangents, i)) for i in range(3)])
    check(vmap_of_gradient, (want_out, want_gradients))
    summed = [
        g if axis == 0 else jax.tree.map(lambda d: d.sum(0), g) for g, axis in zip(want_gradients, axes, strict=True)
    ]
    check(gradient_of_vmap, (want_out, summed))  # fmt: skip


@IMPLEMENTATIONS
def test_vmap_in_vmap_along_other_axes(implementation):
    """Params mapped outside, state and the last axis of xs inside, results put last."""
    args, cotangents = batch(2)
    params, state, xs = args[0], jax.tree.map(lambda v: v[0], args[1]), jnp.moveaxis(args[2], 0, -1)

    @jax.jit
    def run(params, state, xs):
        inner = jax.vmap(partial(unroll, implementation), (None, None, -1), -1)
        return jax.vmap(inner, (0, None, None))(params, state, xs)

    spikes, final = run(params, state, xs)
    assert spikes.shape == (2, T, *LANES, 2) and final.v.shape == (2, *LANES, 2)
    for i in range(2):
        for j in range(2):
            one = jax.tree.map(lambda p, i=i: p[i], params), state, xs[..., j]
            (want, want_final), _ = plain(one, problem()[1])
            assert_fires(want)
            assert_same_spikes(spikes[i, ..., j], want)
            assert_close(jax.tree.map(lambda v, i=i, j=j: v[i, ..., j], final), want_final, 1e-5)


@IMPLEMENTATIONS
@pytest.mark.parametrize("loop", ["scan", "map"])
def test_inside_a_loop(loop, implementation):
    """scan: one sequence in pieces, with the gradient through all of them. map: one problem after another."""
    f = partial(unroll, implementation)
    if loop == "scan":
        args, cotangents = problem()

        def looped(params, state, xs):
            def piece(state, xs):
                spikes, state = f(params, state, xs)
                return state, spikes

            state, spikes = jax.lax.scan(piece, state, xs.reshape(2, T // 2, *LANES))
            return spikes.reshape(T, *LANES), state

        want = plain(args, cotangents)
    else:
        args, cotangents = batch()
        looped = lambda *args: jax.lax.map(lambda args: f(*args), args)
        pick = lambda tree, i: jax.tree.map(lambda leaf: leaf[i], tree)
        want = stack([plain(pick(args, i), pick(cotangents, i)) for i in range(3)])
    check(jax.jit(partial(with_gradients, looped))(args, cotangents), want)


def test_linearize_and_jvp():
    """Only scan has forward mode. A fused kernel has reverse mode, and its error says so."""
    args, cotangents = problem()
    want_out, gradients = plain(args, cotangents)
    out, linear = jax.linearize(partial(unroll, "scan"), *args)
    assert_same_spikes(out[0], want_out[0])
    along = cases.cotangents(args, seed=1)
    dot = lambda a, b: sum(float((x * y).sum()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    np.testing.assert_allclose(dot(linear(*along), cotangents), dot(along, gradients), rtol=1e-4)
    with pytest.raises(TypeError, match="forward-mode.*custom_vjp"):
        jax.jvp(partial(unroll, "interpret"), args, along)


@IMPLEMENTATIONS
def test_constants_closed_over_arrays_and_arguments_are_the_same(implementation):
    (_, state, xs), _ = problem()
    numbers = sf.CubaLIFParams(0.5, 0.7, 1.0)
    arrays = sf.CubaLIFParams(*map(jnp.float32, numbers))
    hosts = sf.CubaLIFParams(np.float32(0.5), np.full(10, 0.7, np.float32), np.ones((4, 1), np.float32))

    @jax.jit
    def run(params, xs):
        return [unroll(implementation, p, state, xs) for p in (params, numbers, arrays, hosts)]

    first, *others = run(arrays, xs)
    want = unroll("scan", arrays, state, xs)
    assert_fires(want[0])
    for out in (first, *others, unroll(implementation, numbers, state, xs)):
        assert_same_spikes(out[0], want[0])
        assert_close(out[1], want[1], 1e-6)


@IMPLEMENTATIONS
def test_donation(implementation):
    args, cotangents = problem()
    want = plain(args, cotangents)[0]
    run = jax.jit(partial(unroll, implementation), donate_argnums=(1, 2))
    params, state, xs = jax.tree.map(jnp.copy, args)
    out = run(params, state, xs)
    assert xs.is_deleted() and state.v.is_deleted() and not params.decay.is_deleted()
    assert_same_spikes(out[0], want[0])
    assert_close(out[1], want[1], 1e-5)


@dataclass(frozen=True)
class Counted:
    """A LIF that counts how often its step is traced; equality ignores the count."""

    lif: sf.LIF = sf.LIF()
    traces: count = field(default_factory=count, compare=False)

    def init_state(self, shape):
        return self.lif.init_state(shape)

    def step(self, params, state, x):
        next(self.traces)
        return self.lif.step(params, state, x)

    def traced(self):
        return next(self.traces)  # counts itself


@IMPLEMENTATIONS
def test_a_second_call_does_not_trace_again(implementation):
    neuron = Counted()
    xs = jax.random.normal(jax.random.key(0), (T, *LANES))

    @partial(jax.jit, static_argnums=0)
    def gradient(neuron, decay, xs):
        f = lambda decay: sf.unroll(neuron, sf.LIFParams(decay), None, xs, implementation=implementation)[0]
        spikes, vjp = jax.vjp(f, decay)
        return spikes, vjp(xs)[0]

    first, slope = gradient(neuron, jnp.float32(0.7), xs)
    assert_fires(first)
    before = neuron.traced()
    assert before > 1
    other, other_slope = gradient(neuron, jnp.float32(0.9), xs + 0.1)
    assert np.any(other != first) and slope != other_slope
    gradient(Counted(traces=neuron.traces), jnp.float32(0.7), xs)  # an equal neuron is the same one
    assert neuron.traced() == before + 1
    gradient(Counted(sf.LIF(sf.SoftReset()), neuron.traces), jnp.float32(0.7), xs)
    assert neuron.traced() > before + 2, "another neuron must be traced"


def test_eager_calls_trace_the_kernels_once():
    """The checks of each call trace the step once; a second call traces nothing more."""
    neuron, xs = Counted(), jax.random.normal(jax.random.key(0), (T, 130))
    run = lambda decay, xs: sf.unroll(neuron, sf.LIFParams(decay), None, xs, implementation="interpret")
    assert_fires(run(jnp.float32(0.7), xs)[0])
    before = neuron.traced()
    run(jnp.float32(0.8), 2 * xs)
    assert neuron.traced() <= before + 2


def only(*names):
    return lambda params, state, xs: {n: {"params": params, "state": state, "xs": xs}[n] for n in names}


ASKED = {  # (what is differentiated, which of (spikes, final state) the loss uses)
    "params, by the spikes": (only("params"), lambda s, final: s),
    "xs, by the spikes": (only("xs"), lambda s, final: s),
    "the state, by the final state": (only("state"), lambda s, final: final),
    "xs and params, by one leaf of the final state": (only("xs", "params"), lambda s, final: final.i),
    "one leaf of params, by the final v": (lambda p, s, x: {"threshold": p.threshold}, lambda s, final: final.v),
    "one leaf of the state, by everything": (lambda p, s, x: {"i": s.i}, lambda s, final: (s, final)),
    "everything, by nothing": (only("params", "state", "xs"), lambda s, final: ()),
}


@pytest.mark.parametrize("asked", ASKED)
def test_unwanted_gradients_and_zero_cotangents(asked):
    args, _ = problem()
    wanted, used = ASKED[asked]

    def f(implementation, wanted):
        params, state, xs = args
        params, state = wanted.get("params", params), wanted.get("state", state)
        params = params._replace(threshold=wanted.get("threshold", params.threshold))
        state = state._replace(i=wanted.get("i", state.i))
        return used(*unroll(implementation, params, state, wanted.get("xs", xs)))

    @jax.jit
    def gradients(wanted):
        def one(implementation):
            out, vjp = jax.vjp(partial(f, implementation), wanted)
            return vjp(cases.cotangents(out))[0]

        return one("interpret"), one("scan")

    got, want = gradients(wanted(*args))
    assert_close(got, want, 1e-4)
    assert any(np.any(g != 0) for g in jax.tree.leaves(want)) == (asked != "everything, by nothing")


def test_explicit_zeros_give_zeros():
    args, cotangents = problem()
    zeros = jax.tree.map(jnp.zeros_like, cotangents)
    out, gradients = jax.jit(partial(with_gradients, partial(unroll, "interpret")))(args, zeros)
    assert_fires(out[0])
    assert all(not leaf.any() for leaf in jax.tree.leaves(gradients))


@dataclass(frozen=True)
class Uneven:
    """A LIF whose initial state differs from lane to lane."""

    lif: sf.LIF = sf.LIF()
    step = property(lambda self: self.lif.step)

    def init_state(self, shape):
        return sf.LIFState(jnp.broadcast_to(jnp.linspace(-1.0, 1.0, shape[-1], dtype=jnp.float32), shape))


@IMPLEMENTATIONS
@pytest.mark.parametrize("neuron", [sf.LIF(v_rest=0.2), Uneven()], ids=["constant", "uneven"])
def test_gradients_from_the_initial_state(neuron, implementation):
    """state=None equals the same state as an argument, both if it is a constant that is compiled in and if it is not."""
    params, xs = sf.LIFParams(jnp.full(10, 0.7), jnp.float32(1.0)), problem()[0][2]

    def f(implementation, state, params, xs):
        return sf.unroll(neuron, params, state, xs, implementation=implementation)

    @jax.jit
    def run(params, xs, cotangents):
        given = partial(f, "scan", neuron.init_state(LANES))
        return [with_gradients(g, (params, xs), cotangents) for g in (partial(f, implementation, None), given)]

    cotangents = cases.cotangents(jax.eval_shape(partial(f, "scan", None), params, xs))
    got, want = run(params, xs, cotangents)
    check(got, want)
    assert all(np.any(g != 0) for g in jax.tree.leaves(want[1]))


def test_a_module_with_a_fused_implementation_under_nnx():
    """nnx.jit, nnx.grad and nnx.vmap of a module with "interpret" give what they give with "scan"."""
    xs, d_s = jax.random.normal(jax.random.key(0), (2, 3, T, *LANES))

    def run(implementation):
        @nnx.vmap(in_axes=(0,))
        def make(decay):
            return nn.LIF(decay=decay, learn=("decay", "threshold"), shape=(10,), implementation=implementation)

        @nnx.jit
        def gradients(layers, xs):
            def loss(layer, xs, d_s):
                spikes, state = layer(xs)
                return (spikes * d_s).sum() + (state.v * d_s[0]).sum(), spikes

            each = nnx.grad(loss, has_aux=True)
            return nnx.vmap(each, in_axes=(0, 0, 0))(layers, xs, d_s)

        (gradient, spikes) = gradients(make(jnp.float32([0.5, 0.7, 0.9])), xs)
        return spikes, nnx.to_pure_dict(gradient)

    (spikes, gradient), (want_spikes, want) = run("interpret"), run("scan")
    assert_fires(want_spikes)
    assert_same_spikes(spikes, want_spikes)
    assert set(want) == {"raw_decay", "raw_threshold"} and want["raw_decay"].shape == (3, 10)
    assert_close(gradient, want, 1e-4)
