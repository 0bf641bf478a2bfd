"""Online rules beside the equations of their papers, in NumPy and float64, and beside backpropagation where they must agree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import assert_close, assert_fires
from flax import nnx

import snnfuse as sf
from snnfuse import nn, online

T, B, IN, H, OUT = 9, 3, 5, 6, 4
RNG = np.random.default_rng(0)
XS = (RNG.random((T, B, IN)) < 0.4) * 1.0
ERROR = RNG.normal(size=(T, B, OUT))  # the loss is sum(outs * ERROR), so that dL/d outs = ERROR
SURROGATE = sf.Sigmoid(2.0)
DECAY, OUT_DECAY, THRESHOLD = 0.7, 0.8, 0.9
psi = lambda u: np.asarray(SURROGATE(jnp.asarray(u)))
loss = lambda outs, error: (outs * error).sum()
whole = lambda model, xs=XS: nnx.grad(lambda model: loss(model(jnp.asarray(xs))[0], jnp.asarray(ERROR[: len(xs)])))(
    model
)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def wide(model):
    """The model with parameters in float64."""
    graphdef, state = nnx.split(model)
    to_wide = lambda x: np.asarray(x, np.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x
    return nnx.merge(graphdef, jax.tree.map(to_wide, state))


def start(model):
    """The state before the first step, in float64."""
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), model.init_state(jnp.asarray(XS)))


def lif(**options):
    reset = options.pop("reset", sf.SoftReset(detach=True))
    return nn.LIF(decay=DECAY, threshold=THRESHOLD, reset=reset, surrogate=SURROGATE, implementation="scan", **options)


def network(*extra):
    rngs = nnx.Rngs(1)
    layers = [nn.Linear(IN, H, rngs=rngs), lif(), *extra, nn.Linear(H, H, rngs=rngs), lif()]
    model = wide(nn.Sequential(*layers, nn.Linear(H, OUT, rngs=rngs), nn.LI(decay=OUT_DECAY, implementation="scan")))
    for layer in model.layers:
        if isinstance(layer, nn.Linear):
            layer.kernel[...] = 1.5 * layer.kernel[...] + 0.1
    return model


def by_hand(model, traced):
    """The gradients of `network` by the equations of SLTT, and with `traced` of OTTT."""
    weights = [np.asarray(model.layers[i].kernel[...]) for i in (0, 2, 4)]
    v, trace = [np.zeros((B, w.shape[1])) for w in weights], [np.zeros((B, w.shape[0])) for w in weights]
    grads, biases, rates = [0 * w for w in weights], [np.zeros(w.shape[1]) for w in weights], []
    for t in range(T):
        s, inputs, us = XS[t], [], []
        for i, (w, decay) in enumerate(zip(weights, (DECAY, DECAY, OUT_DECAY), strict=True)):
            inputs.append(s)
            trace[i] = decay * trace[i] + s
            u = decay * v[i] + s @ w + np.asarray(model.layers[2 * i].bias[...])
            s = (u >= THRESHOLD) * 1.0 if i < 2 else u
            v[i] = u - s * THRESHOLD if i < 2 else u
            us.append(u)
            rates.append(s.mean())
        d = ERROR[t]
        for i in (2, 1, 0):
            d = d if i == 2 else (d @ weights[i + 1].T) * psi(us[i] - THRESHOLD)
            grads[i] += (trace if traced else inputs)[i].T @ d
            biases[i] += d.sum(0)
    assert 0.02 < np.mean([r for i, r in enumerate(rates) if i % 3 < 2]) < 0.6
    return grads, biases


@pytest.mark.parametrize("traced", [False, True], ids=["sltt", "ottt"])
def test_gradients_are_those_of_the_paper_for_every_length_of_a_piece(traced):
    model = network()
    grads, biases = by_hand(model, traced)
    learner = online.ottt(model) if traced else online.sltt(model)
    np.testing.assert_array_equal(learner(jnp.asarray(XS))[0], model(jnp.asarray(XS))[0])
    want_value = loss(model(jnp.asarray(XS))[0], ERROR)
    found = [nnx.jit(whole)(learner)]
    for length in (1, 4):
        options = dict(state=start(learner), length=length)
        run = nnx.jit(lambda learner, options=options: online.gradients(learner, loss, XS, ERROR, **options))
        value, got, _ = run(learner)
        np.testing.assert_allclose(value, want_value, rtol=1e-5)
        found.append(got)
    for got in found:
        for i in range(3):
            of_layer = got["layers"][2 * i]["layer"] if traced else got["layers"][2 * i]
            np.testing.assert_allclose(of_layer["kernel"][...], grads[i], rtol=1e-6, atol=1e-6)
            np.testing.assert_allclose(of_layer["bias"][...], biases[i], rtol=1e-6, atol=1e-6)


def test_one_step_is_backpropagation_and_one_layer_of_ottt_too():
    model = network()
    strip = lambda grads: [x for path, x in nnx.to_flat_state(grads)]
    for learner in (online.sltt(model), online.ottt(model)):
        assert_close(
            [x[...] for x in strip(whole(learner, XS[:1]))], [x[...] for x in strip(whole(model, XS[:1]))], 1e-9
        )
    layer = wide(nn.Sequential(nn.Linear(IN, OUT, use_bias=False, rngs=nnx.Rngs(0)), lif()))
    assert_fires(layer(jnp.asarray(XS))[0])
    exact, got = (
        whole(layer)["layers"][0]["kernel"][...],
        whole(online.ottt(layer))["layers"][0]["layer"]["kernel"][...],
    )
    np.testing.assert_allclose(got, exact, rtol=1e-6)
    assert np.abs(whole(online.sltt(layer))["layers"][0]["kernel"][...] - exact).max() > 0.1 * np.abs(exact).max()


ON_GPU = [pytest.param(name, marks=pytest.mark.gpu) for name in ("pallas", "triton")]


@pytest.mark.parametrize("implementation", ["interpret", *ON_GPU])
@pytest.mark.parametrize("rule", ["ottt", "EpropConv"])
def test_the_rules_run_in_the_kernels(rule, implementation):
    """Outputs, states and gradients by the fused kernels are those by scan, in float32."""

    def make(how):
        neuron = lambda kind=nn.LIF, **options: kind(decay=DECAY, implementation=how, **options)
        fires = lambda: neuron(threshold=0.4, reset=sf.SoftReset(detach=True), surrogate=SURROGATE)
        conv = nn.Conv(2, 3, (3, 3), use_bias=False, rngs=nnx.Rngs(0))
        if rule == "EpropConv":
            return online.EpropConv(conv, fires())
        layers = [conv, fires(), nn.mean_pool, nn.Linear(3, OUT, rngs=nnx.Rngs(1)), neuron(nn.LI)]
        return getattr(online, rule)(nn.Sequential(*layers))

    with jax.enable_x64(False), jax.default_matmul_precision("highest"):
        xs = jnp.asarray(RNG.random((T, B, 4, 4, 2)) < 0.4, jnp.float32)

        @nnx.jit
        def run(model):
            def call(model):
                outs, state = model(xs)
                return (outs * jax.random.normal(jax.random.key(0), outs.shape)).sum(), (outs, state)

            return nnx.value_and_grad(call, has_aux=True)(model)

        got, want = run(make(implementation)), run(make("scan"))
        if rule == "EpropConv":
            assert_fires(want[0][1][0], high=0.6)
        assert_close(jax.tree.leaves(got), jax.tree.leaves(want), 1e-5)


def test_ottt_takes_convolutions_and_other_layers_between():
    rngs = nnx.Rngs(0)
    layers = [nn.Conv(2, 3, (3, 3), rngs=rngs), lif(), nn.mean_pool, nnx.Linear(3, OUT, rngs=rngs)]
    model = wide(nn.Sequential(*layers, nn.LI(decay=OUT_DECAY, implementation="scan")))
    model.layers[0].kernel[...] *= 3
    learner, xs = online.ottt(model), RNG.normal(size=(T, B, 4, 4, 2)) + 0.2
    assert_fires(nn.Sequential(*model.layers[:2])(jnp.asarray(xs))[0])
    of_conv = whole(learner, xs)["layers"][0]["layer"]["kernel"][...]
    trace, want = 0, 0  # one step at a time: the convolution's own gradient at the trace
    neurons = nn.Sequential(*online.sltt(model).layers[1:])
    current, state = model.layers[0](jnp.asarray(xs)), None
    for t in range(T):
        trace = DECAY * trace + xs[t]
        run = lambda c, state=state, t=t: (lambda outs: ((outs[0] * ERROR[t]).sum(), outs[1]))(neurons(c[None], state))
        d, state = jax.grad(run, has_aux=True)(current[t])
        graphdef, params = nnx.split(model.layers[0])
        _, vjp = jax.vjp(lambda p, g=graphdef, a=trace: nnx.merge(g, p)(jnp.asarray(a)), params)
        want = want + vjp(d)[0]["kernel"][...]
    np.testing.assert_allclose(of_conv, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reset", [sf.SoftReset(detach=True), sf.NoReset()], ids=["soft", "none"])
def test_eprop_of_a_convolution_is_its_equation(reset):
    """A trace for each input gives what a trace for each weight at each position gives: `Eprop` with the convolution as a matrix.

    And it is backpropagation through time, whole and one step at a time.
    """
    conv = wide(nn.Conv(2, 3, (3, 3), use_bias=False, rngs=nnx.Rngs(0)))
    conv.kernel[...] = 2 * conv.kernel[...] + 0.1
    layer, xs = wide(online.EpropConv(conv, lif(reset=reset))), (RNG.random((T, B, 4, 4, 2)) < 0.4) * 1.0
    error = RNG.normal(size=(T, B, 4, 4, 3))
    graphdef, params = nnx.split(conv)

    def matrix(params):  # [inputs, neurons]
        return nnx.merge(graphdef, params)(jnp.eye(32).reshape(32, 4, 4, 2)).reshape(32, 48)

    dense, to_kernel = jax.vjp(matrix, params)
    eprop = wide(online.Eprop(lif(reset=reset), 32, 48, recurrent=False, rngs=nnx.Rngs(0)))
    eprop.kernel[...] = dense
    flat, first = jnp.asarray(xs.reshape(T, B, 32)), lambda layer, xs: jax.tree.map(jnp.float64, layer.init_state(xs))
    by_synapse = lambda eprop: (eprop(flat, first(eprop, flat))[0].reshape(error.shape) * error).sum()
    (want,) = to_kernel(nnx.grad(by_synapse)(eprop)["kernel"][...])
    state = first(layer, jnp.asarray(xs))
    got = nnx.grad(lambda layer: (layer(jnp.asarray(xs), state)[0] * error).sum())(layer)["traced"]["layer"]
    assert_fires(layer(jnp.asarray(xs))[0], high=0.9)
    np.testing.assert_allclose(got["kernel"][...], want["kernel"][...], rtol=1e-9)
    exact = nnx.grad(lambda model: (model(jnp.asarray(xs))[0] * error).sum())(nn.Sequential(conv, lif(reset=reset)))
    np.testing.assert_allclose(got["kernel"][...], exact["layers"][0]["kernel"][...], rtol=1e-9)
    _, steps, _ = online.gradients(layer, loss, jnp.asarray(xs), jnp.asarray(error), state=state)
    np.testing.assert_allclose(steps["traced"]["layer"]["kernel"][...], want["kernel"][...], rtol=1e-9)


@pytest.mark.parametrize(
    "make, error, message",
    [
        (
            lambda conv: online.EpropConv(conv(), lif(reset=sf.HardReset())),
            NotImplementedError,
            "reset SoftReset.*got Hard",
        ),
        (
            lambda conv: online.EpropConv(conv(), alif(sf.NoReset())),
            NotImplementedError,
            "one decay that is not trained",
        ),
        (lambda conv: online.EpropConv(conv(use_bias=True), lif()), ValueError, "layer must have no bias"),
        (lambda conv: online.EpropConv(nn.flatten, lif()), TypeError, "layer must be linear"),
        (lambda conv: online.EpropConv(conv(), 3), TypeError, "neuron must be a module"),
    ],
)
def test_what_a_convolution_cannot_learn_by_eprop_is_named(make, error, message):
    def conv(use_bias=False):
        return nn.Conv(2, 3, (3, 3), use_bias=use_bias, rngs=nnx.Rngs(0))

    with pytest.raises(error, match=message):
        make(conv)


def alif(reset):
    options = dict(decay=DECAY, decay_adapt=0.9, beta=0.3, threshold=THRESHOLD, reset=reset, surrogate=SURROGATE)
    return nn.AdaptiveLIF(implementation="scan", **options)


def eprop(neuron, **options):
    layer = wide(online.Eprop(neuron, IN, OUT, rngs=nnx.Rngs(2), **options))
    layer.kernel[...] = 1.5 * layer.kernel[...] + 0.1
    return layer


@pytest.mark.parametrize("adapts", [False, True], ids=["lif", "adaptive"])
def test_eprop_is_that_of_the_paper(adapts):
    """Bellec et al. 2020, equations 22 to 25: traces of the membrane and of the threshold, for each synapse."""
    layer = eprop(alif(sf.NoReset()) if adapts else lif())
    beta, rho = (0.3, 0.9) if adapts else (0.0, 0.0)
    w, w_rec = np.asarray(layer.kernel[...]), np.asarray(layer.weight[...]) * (1 - np.eye(OUT))
    v, a, z, spikes = np.zeros((B, OUT)), np.zeros((B, OUT)), np.zeros((B, OUT)), []
    trace, of_a, want = np.zeros((B, IN + OUT)), np.zeros((B, IN + OUT, OUT)), np.zeros((IN + OUT, OUT))
    for t in range(T):
        trace = DECAY * trace + np.concatenate([XS[t], z], 1)  # of the membrane: the same for all neurons
        u = DECAY * v + XS[t] @ w + z @ w_rec
        away = u - (THRESHOLD + beta * a)
        z, slope = (away >= 0) * 1.0, psi(away)[:, None]
        eligibility = slope * (trace[:, :, None] - beta * of_a)
        of_a = slope * trace[:, :, None] + (rho - slope * beta) * of_a
        v, a = u - (0 if adapts else THRESHOLD) * z, rho * a + z
        want += np.einsum("bh,bih->ih", ERROR[t], eligibility)
        spikes.append(z)
    np.testing.assert_array_equal(layer(jnp.asarray(XS), start(layer))[0], spikes)
    assert_fires(spikes, high=0.7)
    run = lambda layer, xs: loss(layer(xs, start(layer))[0], ERROR)
    got = nnx.grad(run)(layer, jnp.asarray(XS))
    np.testing.assert_allclose(got["kernel"][...], want[:IN], rtol=1e-9)
    np.testing.assert_allclose(got["weight"][...], want[IN:] * (1 - np.eye(OUT)), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("neuron", [alif(sf.HardReset()), lif(reset=sf.HardReset())], ids=["adaptive", "lif"])
def test_eprop_without_recurrence_is_backpropagation(neuron):
    layer, linear = eprop(neuron, recurrent=False), wide(nn.Linear(IN, OUT, use_bias=False, rngs=nnx.Rngs(0)))
    linear.kernel[...] = layer.kernel[...]
    exact = whole(nn.Sequential(linear, neuron))["layers"][0]["kernel"][...]
    got = nnx.grad(lambda layer: loss(layer(jnp.asarray(XS), start(layer))[0], ERROR))(layer)["kernel"][...]
    np.testing.assert_allclose(got, exact, rtol=1e-9)


@pytest.mark.parametrize("readout", ["symmetric", "random"])
def test_eprop_gives_the_same_gradient_in_pieces(readout):
    """Step by step the eligibility is filtered as the readout filters; over all steps the readout's own gradient does it."""
    make = nn.Linear if readout == "symmetric" else online.RandomFeedback
    grads = []
    for length, decay_out in ((1, OUT_DECAY), (T, 0.0)):
        last = [make(OUT, OUT, rngs=nnx.Rngs(3)), nn.LI(decay=OUT_DECAY, implementation="scan")]
        model = nn.Sequential(eprop(alif(sf.SoftReset(detach=True)), decay_out=decay_out), *map(wide, last))
        options = dict(state=start(model), length=length)
        grads.append(online.gradients(model, loss, jnp.asarray(XS), jnp.asarray(ERROR), **options)[1]["layers"][0])
    for name in ("kernel", "weight"):
        np.testing.assert_allclose(grads[0][name][...], grads[1][name][...], rtol=1e-9, atol=1e-12)
    assert np.abs(grads[0]["weight"][...]).max() > 0.01


def test_eprop_of_lif_neurons_needs_no_trace_per_synapse():
    layer = eprop(lif())
    of_synapses = nnx.grad(lambda layer: loss(layer(jnp.asarray(XS), start(layer))[0], ERROR))(layer)
    recurrent = nn.Recurrent(lif(), OUT, self_connections=False, rngs=nnx.Rngs(0))
    model = wide(nn.Sequential(nn.Linear(IN, OUT, use_bias=False, rngs=nnx.Rngs(0)), recurrent))
    model.layers[0].kernel[...], model.layers[1].weight[...] = layer.kernel[...], layer.weight[...]
    learner = online.ottt(model)
    got = nnx.grad(lambda m: loss(m(jnp.asarray(XS), start(m))[0], ERROR))(learner)["layers"]
    np.testing.assert_allclose(got[0]["layer"]["kernel"][...], of_synapses["kernel"][...], rtol=1e-6)
    np.testing.assert_allclose(got[1]["layer"]["weight"][...], of_synapses["weight"][...], rtol=1e-6, atol=1e-6)


def test_random_feedback_sends_the_error_through_other_weights():
    layer = wide(online.RandomFeedback(IN, OUT, rngs=nnx.Rngs(0)))
    outs, vjp = jax.vjp(layer, jnp.asarray(XS))
    np.testing.assert_allclose(outs, XS @ np.asarray(layer.kernel[...]), rtol=1e-9)
    np.testing.assert_allclose(vjp(jnp.asarray(ERROR))[0], ERROR @ np.asarray(layer.feedback[...]).T, rtol=1e-9)
    got = nnx.grad(lambda layer: loss(layer(jnp.asarray(XS)), ERROR))(layer)
    np.testing.assert_allclose(got["kernel"][...], np.einsum("tbi,tbo->io", XS, ERROR), rtol=1e-9)
    np.testing.assert_allclose(got["bias"][...], ERROR.sum((0, 1)), rtol=1e-9)


def test_memory_does_not_depend_on_the_number_of_steps():
    def held(make, T):
        model = make(
            nn.Sequential(nn.Linear(IN, H, rngs=nnx.Rngs(0)), lif(), nn.Linear(H, OUT, rngs=nnx.Rngs(0)), lif())
        )
        xs, error = (jax.ShapeDtypeStruct((T, B, n), jnp.float32) for n in (IN, OUT))
        graphdef, variables = nnx.split(model)
        run = lambda variables, *args: online.gradients(nnx.merge(graphdef, variables), loss, *args)[:2]
        return jax.jit(run).lower(variables, xs, error).compile().memory_analysis().temp_size_in_bytes

    with jax.enable_x64(False):
        last = lambda model: nn.Sequential(online.Eprop(alif(sf.HardReset()), IN, OUT, rngs=nnx.Rngs(0)))
        for make in (online.sltt, online.ottt, last):
            assert held(make, 400) <= held(make, 100) + 64, make


@pytest.mark.parametrize(
    "make, error, message",
    [
        (
            lambda: online.sltt(nn.Recurrent(lif(), 3, rngs=nnx.Rngs(0))),
            NotImplementedError,
            "model must have no recurrent layer",
        ),
        *(
            (
                lambda make=make: online.sltt(nn.Sequential(make(nnx.Rngs(0)), lif())),
                NotImplementedError,
                "carries a gradient between steps; got a .* at layers.0",
            )
            for make in (
                lambda rngs: nn.Delay(3, 2, rngs=rngs),
                lambda rngs: nn.DelayedLinear(3, 3, 2, rngs=rngs),
                lambda rngs: nn.TimeConv(3, 3, (2,), rngs=rngs),
                lambda rngs: nn.MaskedPSN(4, 2, rngs=rngs),
                lambda rngs: nn.SlidingPSN(3),
                lambda rngs: online.Eprop(lif(), 3, 3, rngs=rngs),
            )
        ),
        *(
            (lambda make=make: online.ottt(nn.Sequential(make(nnx.Rngs(0)), lif())), NotImplementedError, message)
            for make, message in (
                (
                    lambda rngs: nn.Quantised(nn.Linear(3, 3, rngs=rngs)),
                    "layer 0, a Quantised, must have no Linear inside",
                ),
                (lambda rngs: nn.Folded(nnx.Linear(3, 3, rngs=rngs)), "layer 0, a Folded, must have no Linear inside"),
                (lambda rngs: nn.PSN(4, rngs=rngs), "layer 0, a PSN, must have no PSN inside"),
            )
        ),
        (
            lambda: online.ottt(nn.Sequential(alif(sf.HardReset()))),
            NotImplementedError,
            "neurons must be IF, LIF or LI",
        ),
        (
            lambda: online.ottt(
                nn.Sequential(nn.Linear(3, 3, rngs=nnx.Rngs(0)), nn.BatchNorm(3, rngs=nnx.Rngs(0)), lif())
            ),
            NotImplementedError,
            "layer 0, a Linear, must come right before a neuron",
        ),
        (lambda: online.ottt(lif()), TypeError, "model must be an nn.Sequential; got LIF"),
        (
            lambda: online.Traced(nnx.Linear(3, 3, rngs=nnx.Rngs(0)), 1.5),
            ValueError,
            r"decay must be in \[0, 1\]; got 1.5",
        ),
        (
            lambda: online.gradients(lif(), loss, jnp.zeros((3, 2, 4)), length=0),
            ValueError,
            "length must be a whole number",
        ),
        (
            lambda: online.gradients(lif(), loss, jnp.zeros((3, 2)), jnp.zeros((2, 2))),
            ValueError,
            r"got lengths \[2, 3\]",
        ),
        (lambda: eprop(lif())(jnp.zeros((3, 2, 4))), ValueError, r"xs must be floats \[T, B, 5\]"),
    ],
)
def test_bad_use_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_gradients_take_packed_spikes():
    model = online.sltt(nn.Sequential(nn.Linear(IN, OUT, rngs=nnx.Rngs(0)), nn.LI(tau=3.0)))
    xs, square = jnp.asarray(XS, jnp.float32), lambda outs: jnp.square(outs).sum()
    want, got = (online.gradients(model, square, xs)[1] for xs in (xs, nn.Spikes.of(xs)))
    assert_close(got, want, 1e-6)


def test_sequences_of_other_lengths_are_refused_by_name():
    xs = nn.Padded(jnp.asarray(XS), jnp.array([9, 3, 5]))
    conv = online.EpropConv(nn.Linear(IN, OUT, use_bias=False, rngs=nnx.Rngs(0)), lif())
    eprop = online.Eprop(lif(), IN, OUT, rngs=nnx.Rngs(0))
    ottt, recurrent = (
        online.ottt(network()).layers[0],
        online.ottt(nn.Sequential(nn.Recurrent(lif(), IN, rngs=nnx.Rngs(0)))),
    )
    calls = {"EpropConv": conv, "Eprop": eprop, "Traced": ottt, "TracedRecurrent": recurrent.layers[0]}
    calls |= {"RandomFeedback": online.RandomFeedback(IN, OUT, rngs=nnx.Rngs(0))}
    calls |= {"online.gradients": lambda xs: online.gradients(conv, loss, xs, jnp.asarray(ERROR))}
    for name, call in calls.items():
        with pytest.raises(NotImplementedError, match=f"^{name} takes no sequences of other lengths, nn.Padded"):
            call(xs)
