"""Sequences of other lengths in a batch, `nn.Padded`: outputs, states, statistics and gradients are those of each sequence alone."""

from functools import partial

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import assert_close, assert_fires
from flax import nnx

import snnfuse as sf
from snnfuse import nn, training
from snnfuse.data import audio, loader
from snnfuse.data.events import Sensor

T, B, N = 9, 3, 4
LENGTHS = (9, 1, 5)
rngs = lambda: nnx.Rngs(0)
lif = partial(nn.LIF, decay=0.7, threshold=0.6, reset=sf.SoftReset())
dense = lambda: [nn.Linear(N, N, rngs=rngs()), nn.BatchNorm(N, use_running_average=True, rngs=rngs()), lif()]
LAYERS = {
    "scan": lambda: lif(implementation="scan", learn="decay"),
    "interpret": lambda: nn.CubaLIF(decay_syn=0.5, decay=0.7, implementation="interpret", learn="decay"),
    "NormSpiking": lambda: nn.NormSpiking(lif(), nnx.LayerNorm(N, rngs=rngs()), connect="add"),
    "Recurrent": lambda: nn.Recurrent(lif(), N, rngs=rngs()),
    "Feedback": lambda: nn.Feedback(lif(), nnx.Linear(N, N, rngs=rngs())),
    "Delay": lambda: nn.Delay(N, 2, rngs=rngs()),
    "DelayedLinear": lambda: nn.DelayedLinear(N, 5, 2, rngs=rngs()),
    "TimeConv": lambda: nn.TimeConv(N, 5, (3,), rngs=rngs()),
    "SlidingPSN": lambda: nn.SlidingPSN(3),
    "Remat": lambda: nn.Remat(nn.Sequential(*dense(), nn.PackSpikes(), nn.Linear(N, N, rngs=rngs()), lif())),
    "Pieces": lambda: nn.Pieces(nn.Sequential(nn.Delay(N, 2, rngs=rngs()), nn.Recurrent(lif(), N, rngs=rngs())), 4),
}


def sequences():
    """[T, B, N] with numbers after the ends that would be seen."""
    xs = 0.3 + jax.random.normal(jax.random.key(0), (T, B, N))
    real = jnp.arange(T)[:, None] < jnp.array(LENGTHS)
    return jnp.where(real[:, :, None], xs, 1e3), real[:, :, None]


LAYERS_ON_GPU = {
    "pallas": lambda: nn.CubaLIF(decay_syn=0.5, decay=0.7, implementation="pallas", learn="decay"),
    "triton": lambda: nn.CubaLIF(decay_syn=0.5, decay=0.7, implementation="triton", learn="decay"),
    "fused Recurrent": lambda: nn.Recurrent(lif(implementation="triton"), N, rngs=rngs()),
}


@pytest.mark.parametrize("name", [*LAYERS, *(pytest.param(name, marks=pytest.mark.gpu) for name in LAYERS_ON_GPU)])
def test_a_layer_gives_what_it_gives_for_each_sequence_alone(name):
    layer, (xs, real) = (LAYERS | LAYERS_ON_GPU)[name](), sequences()
    graphdef, params, rest = nnx.split(layer, nnx.Param, ...)
    more = (jnp.where(real, 0.5, jnp.zeros_like(xs)),) if name == "NormSpiking" else ()

    def call(params, xs, more):
        return nnx.merge(graphdef, params, rest, copy=True)(xs, None, *more)

    def padded(params, xs):
        outs, state = call(params, nn.Padded(xs, jnp.array(LENGTHS)), more)
        return jnp.where(real, outs.values, 0), state

    def alone(params, xs):
        found = [call(params, xs[:L, b : b + 1], tuple(x[:L, b : b + 1] for x in more)) for b, L in enumerate(LENGTHS)]
        outs = [jnp.pad(outs, ((0, T - len(outs)), *((0, 0),) * (outs.ndim - 1))) for outs, _ in found]
        whole = jax.eval_shape(call, params, xs, more)[1]
        batch = lambda leaf: leaf.shape.index(B, 0, 2)  # the second axis of a state that is the last inputs
        joined = jax.tree.map(lambda like, *x: jnp.concatenate(x, batch(like)), whole, *(state for _, state in found))
        return jnp.concatenate(outs, 1), joined

    @partial(jax.jit, static_argnums=0)
    def run(way, params, xs):
        results, vjp = jax.vjp(way, params, xs)
        return results, vjp(cases.cotangents(results))

    want = run(alone, params, xs)
    if name not in ("Delay", "DelayedLinear", "TimeConv"):
        assert_fires(want[0][0], high=0.9)
    assert_close(run(padded, params, xs), want, 1e-5)


@pytest.mark.parametrize("norm", [nn.BatchNorm, nnx.BatchNorm, partial(nn.TEBN, T)])
def test_batch_statistics_are_those_of_the_real_steps(norm):
    """Values, running averages and gradients are those of all real steps one after another."""
    xs, real = sequences()
    norm, joined = norm(N, rngs=rngs()), jnp.concatenate([xs[:L, b] for b, L in enumerate(LENGTHS)])[:, None]
    plain = nn.BatchNorm if isinstance(norm, nn.BatchNorm) else nnx.BatchNorm

    @nnx.jit(static_argnames="padded")
    def run(norm, xs, padded):
        graphdef, params, rest = nnx.split(norm, nnx.Param, ...)

        def call(params, xs):
            layer = nnx.merge(graphdef, params, rest, copy=True)
            outs = nn.Sequential(layer)(nn.Padded(xs, jnp.array(LENGTHS)) if padded else xs)[0]
            outs = jnp.concatenate([outs.values[:L, b] for b, L in enumerate(LENGTHS)])[:, None] if padded else outs
            return outs, nnx.state(layer, nnx.BatchStat)

        outs, vjp, averages = jax.vjp(call, params, xs, has_aux=True)
        d_params, d_xs = vjp(cases.cotangents(outs))
        d_xs = jnp.concatenate([d_xs[:L, b] for b, L in enumerate(LENGTHS)])[:, None] if padded else d_xs
        return outs, averages, d_params["scale"], d_params["bias"], d_xs

    assert_close(run(norm, xs, True), run(plain(N, rngs=rngs()), joined, False), 1e-5)


def test_readouts_and_loss_take_padded():
    xs, _ = sequences()
    lengths, labels = jnp.array(LENGTHS), jnp.arange(B)
    for read in (nn.membrane_mean, nn.membrane_max, nn.membrane_last, nn.spike_rate):
        np.testing.assert_array_equal(read(nn.Padded(xs, lengths)), read(xs, lengths))
    loss = training.temporal_cross_entropy
    np.testing.assert_array_equal(loss(nn.Padded(xs, lengths), labels), loss(xs, labels, lengths=lengths))


@pytest.mark.parametrize(
    "layer", [lambda: nn.PSN(T, rngs=rngs()), lambda: nn.BatchNorm(N, per_step=True, rngs=rngs()), lambda: nn.flatten]
)
def test_what_cannot_take_padded_says_so(layer):
    xs, _ = sequences()
    padded = nn.Padded(xs, jnp.array(LENGTHS))
    if (layer := layer()) is nn.flatten:  # a function of one step is fine in a Sequential
        assert nn.Sequential(layer)(padded)[0].values.shape == (T, B, N)
        return
    with pytest.raises(NotImplementedError, match="takes no sequences of other lengths"):
        nn.Sequential(layer)(padded)


def test_two_lengths_and_lengths_out_of_range_are_named():
    xs, _ = sequences()
    with pytest.raises(ValueError, match="lengths must be None"):
        nn.membrane_mean(nn.Padded(xs, jnp.array(LENGTHS)), jnp.array(LENGTHS))
    for bad, message in (
        (jnp.array([0, 1, 2]), "lengths must be from 1 to T = 9"),
        (jnp.ones(3), "lengths must be int"),
    ):
        for layer in (nn.LIF(tau=2.0), nn.Sequential(nn.BatchNorm(N, rngs=rngs())), nn.Delay(N, 2, rngs=rngs())):
            with pytest.raises(ValueError, match=message):
                layer(nn.Padded(xs, bad))


def test_the_loader_says_how_long_each_sample_is():
    sensor, rng = Sensor(4, 4, 2), np.random.default_rng(0)
    events = {"x": np.zeros(3, int), "y": np.zeros(3, int), "p": np.zeros(3, int), "t": np.array([5, 10, 36])}
    sample = dict(audio=np.zeros(500, np.int16), signal=np.zeros((7, 2)), events=events, label=3)
    options = dict(split="dt", dt=10, lengths=True)
    made = [loader.Sound(800, lengths=True), loader.Signals(5, lengths=True), loader.Frames(sensor, 9, **options)]
    made += [loader.PackedFrames(sensor, 2, 8, **options), loader.Frames(sensor, 6, lengths=True)]
    assert [int(example(sample, rng)["length"]) for example in made] == [500, 5, 4, 2, 6]
    assert made[2](sample, rng)["frames"].any(-1).nonzero()[0].max() == 3
    assert "length" not in loader.Sound(800)(sample, rng)
    sound = jnp.ones((1, 500))
    assert audio.steps(jnp.array([500, 300]), 256, 80).tolist() == [len(audio.log_mel(sound, 8000)), 1]


def test_pieces_after_the_end_of_a_sequence_do_not_count_in_statistics():
    xs, _ = sequences()
    norm = nn.BatchNorm(N, momentum=0.0, rngs=rngs())
    run = nn.Pieces(nn.Sequential(norm, lif()), 3, statistics="piece")
    grads = nnx.grad(lambda run, xs: (run(nn.Padded(xs, jnp.array([3, 1, 5])))[1][0].v ** 2).sum())(run, xs)
    np.testing.assert_allclose(norm.mean[...], xs[3:5, 2].mean(0), rtol=1e-5)  # the last piece has no real step
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(grads))
    run = nn.Pieces(nn.Sequential(nnx.BatchNorm(N, rngs=rngs()), lif()), 3, statistics="piece")
    with pytest.raises(NotImplementedError, match="nnx.BatchNorm at layers.0: Pieces of nn.Padded need nn.BatchNorm"):
        run(nn.Padded(xs, jnp.array(LENGTHS)))


def test_a_shortcut_does_not_lose_its_lengths():
    layer, (xs, _) = nn.NormSpiking(lif(), nn.BatchNorm(N, rngs=rngs())), sequences()
    with pytest.raises(ValueError, match="xs must be nn.Padded where shortcut is"):
        layer(xs, None, nn.Padded(xs, jnp.array(LENGTHS)))


def test_a_shortcut_has_the_lengths_of_xs():
    layer, (xs, _) = nn.NormSpiking(lif(), nn.BatchNorm(N, rngs=rngs())), sequences()
    padded = lambda *lengths: nn.Padded(xs, jnp.array(lengths))
    with pytest.raises(ValueError, match=r"shortcut must have the lengths of xs, \[9, 1, 5\]; got \[9, 2, 5\]"):
        layer(padded(*LENGTHS), None, padded(9, 2, 5))
    layer(padded(*LENGTHS), None, padded(*LENGTHS))


def test_a_sequence_without_steps_has_no_readout():
    """Inside of jit, where nothing can raise, it is NaN; the others stay as they are."""
    xs, _ = sequences()
    empty, full = jnp.array([9, 0, 5]), jnp.array(LENGTHS)
    for read in (nn.membrane_mean, nn.membrane_max, nn.membrane_last, nn.spike_rate):
        got = jax.jit(read)(xs, empty)
        assert jnp.isnan(got[1]).all()
        np.testing.assert_array_equal(got[::2], jax.jit(read)(xs, full)[::2])
        with pytest.raises(ValueError, match="lengths must be from 1 to T = 9; got 0 to 9"):
            read(xs, empty)
    loss = jax.jit(lambda xs, lengths: training.temporal_cross_entropy(xs, jnp.arange(B), lengths=lengths))
    assert jnp.isnan(loss(xs, empty)) and jnp.isfinite(loss(xs, full))


def test_lengths_above_T_count_as_T_inside_of_jit():
    layer, (xs, _) = nn.TimeConv(N, N, (3,), rngs=rngs()), sequences()
    state = lambda L: layer(nn.Padded(xs, L))[1]
    np.testing.assert_array_equal(jax.jit(state)(jnp.array([T + 3, 1, 5])), state(jnp.array([T, 1, 5])))
