"""Groups of parameters, the average of the weights, and the loss of every time step."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from snnfuse import nn, training
from snnfuse.nn import monitor


def network(seed=0):
    rngs = nnx.Rngs(seed)
    layers = [nn.Linear(3, 4, rngs=rngs), nn.NormSpiking(nn.LIF(tau=2.0, learn="decay"), nn.BatchNorm(4, rngs=rngs))]
    return nn.Sequential(*layers, nn.Recurrent(nn.LIF(tau=2.0), 4, rngs=rngs), nnx.LayerNorm(4, rngs=rngs))


def test_every_parameter_has_its_group():
    groups = {".".join(map(str, p[1:])): g for p, g in nnx.to_flat_state(training.parameter_groups(network()))}
    assert groups == {
        "0.kernel": "weight",
        "0.bias": "bias",
        "1.neuron.raw_decay": "neuron",
        "1.norm.scale": "norm",
        "1.norm.bias": "norm",
        "2.weight": "weight",
        "3.scale": "norm",
        "3.bias": "norm",
    }

    layers = nn.DelayedLinear(3, 4, 2, rngs=nnx.Rngs(0)), nn.PSN(5, rngs=nnx.Rngs(0))
    groups = {p[-1]: g for p, g in nnx.to_flat_state(training.parameter_groups(nn.Sequential(*layers)))}
    assert groups == dict(raw_delay="neuron", kernel="weight", bias="bias", threshold="neuron", weight="weight")


def moved(transform):
    """Which parameters a step with gradients of zero, or one, moves."""
    model = network()
    before = dict(nnx.to_flat_state(nnx.clone(nnx.state(model, nnx.Param))))
    optimizer = nnx.Optimizer(model, transform(training.parameter_groups(model)), wrt=nnx.Param)
    optimizer.update(model, jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param)))
    after = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    return {path[1:]: after[path][...] - before[path][...] for path in before}


def test_weights_alone_decay():
    decayed = lambda groups: jax.tree.map(lambda group: group == "weight", groups)
    changes = moved(lambda groups: optax.adamw(0.1, weight_decay=0.5, mask=decayed(groups)))
    assert {path for path, change in changes.items() if jnp.any(change != 0)} == {(0, "kernel"), (2, "weight")}


def test_neurons_get_a_learning_rate_of_their_own():
    def transform(groups):
        add = lambda by: optax.stateless(lambda updates, _: jax.tree.map(lambda u: u + by, updates))
        return optax.multi_transform(dict(neuron=add(3.0), norm=add(0.0), bias=add(1.0), weight=add(2.0)), groups)

    changes = moved(transform)
    assert float(changes[1, "neuron", "raw_decay"]) == 3
    np.testing.assert_allclose(changes[0, "kernel"], 2, rtol=1e-6)
    np.testing.assert_allclose(changes[0, "bias"], 1)


def test_the_average_follows_parameters_and_copies_the_rest():
    model, average = network(1), network(2)
    model.layers[1].norm.mean[...] = jnp.arange(4.0)
    before, to = average.layers[0].kernel[...], model.layers[0].kernel[...]
    step = training.compiled_step(lambda average, model: training.update_average(average, model, 0.75))
    step(average, model)
    np.testing.assert_allclose(average.layers[0].kernel[...], 0.75 * before + 0.25 * to, rtol=1e-6)
    np.testing.assert_array_equal(average.layers[1].norm.mean[...], jnp.arange(4.0))
    np.testing.assert_array_equal(model.layers[0].kernel[...], to)
    other = nn.Sequential(nn.Linear(3, 5, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="average must have the variables of model; these differ: .*kernel"):
        training.update_average(other, model, 0.9)
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\); got 1"):
        training.update_average(average, model, 1)


def test_sixteen_bits_stay_in_the_average_and_leave_the_loss():
    model, average = (nnx.Linear(3, 4, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(seed)) for seed in (0, 1))
    training.update_average(average, model, jnp.float32(0.9))
    assert average.kernel.dtype == jnp.bfloat16
    outs, labels = jax.random.normal(jax.random.key(0), (6, 3, 4)).astype(jnp.bfloat16), jnp.array([0, 3, 1])
    loss = training.temporal_cross_entropy(outs, labels)
    assert loss == training.temporal_cross_entropy(outs.astype(jnp.float32), labels)


def test_the_loss_of_every_step_is_the_papers():
    outs = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    labels = np.array([0, 4, 2, 2])
    p = np.exp(outs) / np.exp(outs).sum(-1, keepdims=True)
    entropy = np.mean([-np.log(p[t, b, labels[b]]) for t in range(3) for b in range(4)])
    want = 0.95 * entropy + 0.05 * np.mean((outs - 0.7) ** 2)
    loss = training.temporal_cross_entropy(jnp.asarray(outs), jnp.asarray(labels), mse=0.05, level=0.7)
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    same = training.temporal_cross_entropy(jnp.asarray(outs), jax.nn.one_hot(labels, 5), mse=0.05, level=0.7)
    np.testing.assert_allclose(same, want, rtol=1e-5)


def test_the_loss_of_sequences_of_other_lengths_is_that_of_each_alone():
    outs, lengths, labels = jax.random.normal(jax.random.key(0), (6, 3, 4)), jnp.array([6, 1, 3]), jnp.array([0, 3, 1])
    padded = jnp.where(jnp.arange(6)[:, None, None] >= lengths[:, None], jnp.inf, outs)
    loss = lambda outs, labels, **options: training.temporal_cross_entropy(outs, labels, mse=0.3, **options)
    alone = [loss(outs[:n, b : b + 1], labels[b : b + 1]) for b, n in enumerate([6, 1, 3])]
    np.testing.assert_allclose(loss(padded, labels, lengths=lengths), np.mean(alone), rtol=1e-6)
    assert bool(jnp.isfinite(jax.grad(loss)(padded, labels, lengths=lengths)).all())


@pytest.mark.parametrize(
    "outs, targets, mse, message",
    [
        ((4, 5), (4,), 0.0, r"outs must be \[T, B, classes\], floating; got float32 of shape \(4, 5\)"),
        ((3, 4, 5), (3,), 0.0, r"targets must be .* for outs \(3, 4, 5\); got int32 of shape \(3,\)"),
        ((3, 4, 5), (4, 5), 0.0, r"targets must be .* got int32 of shape \(4, 5\)"),
        ((3, 4, 5), (4,), 2.0, r"mse must be in \[0, 1\]; got 2.0"),
    ],
)
def test_bad_input_of_the_loss_is_named(outs, targets, mse, message):
    with pytest.raises(ValueError, match=message):
        training.temporal_cross_entropy(jnp.zeros(outs), jnp.zeros(targets, jnp.int32), mse=mse)


def test_rate_penalty_is_zero_inside_of_the_band_and_squares_outside():
    counts = {"a": jnp.array([[0.0, 4.0, 10.0], [0.0, 2.0, 6.0]]), "b": jnp.full((2, 5, 4), 3.0)}  # T = 10
    rates = np.array([0.0, 0.3, 0.8])
    want = (np.square(np.maximum(rates - 0.5, 0)) + np.square(np.maximum(0.1 - rates, 0))).mean() / 2
    penalty = partial(training.rate_penalty, counts, 10)
    np.testing.assert_allclose(penalty(lower=0.1, upper=0.5), want, rtol=1e-6)
    assert penalty(lower=0.1, upper=0.5, per="layer") == 0
    np.testing.assert_allclose(penalty(upper=0.2, per="layer"), ((11 / 30 - 0.2) ** 2 + 0.1**2) / 2, rtol=1e-5)
    only = lambda per: training.rate_penalty({"b": counts["b"].at[:, 0].set(0.0)}, 10, lower=0.25, per=per)
    np.testing.assert_allclose([only("neuron"), only("channel")], [0.25**2 / 5, 0.01**2], rtol=1e-4)
    for error, call in (
        ("lower and upper must be 0 <= lower <= upper; got 0.5 and 0.2", lambda: penalty(lower=0.5, upper=0.2)),
        ("per must be one of neuron, channel, layer; got 'lane'", lambda: penalty(per="lane")),
        ("counts must have at least one layer", lambda: training.rate_penalty({}, 10)),
        ("steps must be at least 1", lambda: training.rate_penalty(counts, 0)),
    ):
        with pytest.raises(ValueError, match=error):
            call()


def test_a_rate_penalty_makes_a_network_sparser():
    def rate(weight):
        layer, xs = nn.Sequential(nn.Linear(5, 20, rngs=nnx.Rngs(0)), nn.LIF(tau=2.0)), 3 * jnp.ones((8, 4, 5))
        optimizer = nnx.Optimizer(layer, optax.sgd(1.0), wrt=nnx.Param)

        @nnx.jit
        def step(layer, optimizer):
            def loss(layer):
                with monitor.watch(layer, what="counts") as counts:
                    layer(xs)
                return weight * training.rate_penalty(counts, 8, lower=0.1, upper=0.2, per="layer"), counts

            grads, counts = nnx.grad(loss, has_aux=True)(layer)
            optimizer.update(layer, grads)
            return sum(count.mean() / 8 for count in counts.values())

        return [float(step(layer, optimizer)) for _ in range(60)]

    free, held = rate(0.0), rate(10.0)
    assert free[0] == free[-1] > 0.25 and 0.09 < held[-1] < 0.21
