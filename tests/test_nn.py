"""The modules: parameters, gradients, sequences in pieces, layers folded over time, NNX transforms, and errors for bad input."""

import pickle
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compare import assert_close, assert_fires, assert_same_spikes
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import snnfuse
from snnfuse import nn
from snnfuse.nn.monitor import record

strict = pytest.mark.usefixtures(
    "strict"
)  # not for tests that run Flax's layers or optax, which promote dtypes and ranks

B, N = 3, 5
# every module with all its parameters learned, one per channel, and a scale of inputs at which it fires
MODULES = {
    "IF": (partial(nn.IF, learn=("threshold",)), 0.3),
    "LIF": (partial(nn.LIF, tau=2.0, learn=("decay", "threshold"), reset=snnfuse.SoftReset()), 0.6),
    "ParametricLIF": (partial(nn.ParametricLIF, tau=2.0, learn=("threshold",)), 1.1),
    "CubaLIF": (partial(nn.CubaLIF, tau_syn=2.0, tau=4.0, learn=("decay_syn", "decay", "threshold")), 0.4),
    "AdaptiveLIF": (
        partial(nn.AdaptiveLIF, tau=3.0, tau_adapt=10.0, learn=("decay", "decay_adapt", "beta", "threshold")),
        0.6,
    ),
    "ExpIF": (partial(nn.ExpIF, tau=2.0, learn=("decay", "theta", "delta", "threshold")), 0.7),
    "Izhikevich": (partial(nn.Izhikevich, learn=("a", "b", "c", "d", "threshold")), 18.0),
    "LI": (partial(nn.LI, tau=3.0, learn=("decay",)), 1.0),
}


def inputs(scale, T=40, seed=0):
    return scale * (0.5 + jax.random.normal(jax.random.key(seed), (T, B, N)))


def module(name):
    make, scale = MODULES[name]
    layer, xs = make(shape=(N,)), inputs(scale)
    if name != "LI":
        assert_fires(layer(xs)[0])
    return layer, xs


@strict
@pytest.mark.parametrize("name", MODULES)
def test_a_module_is_unroll_by_hand(name):
    """Compare outputs, final state and the gradients of xs and every learned parameter, under random cotangents."""
    layer, xs = module(name)
    graphdef, params, rest = nnx.split(layer, nnx.Param, ...)

    def by_module(params, xs):
        return nnx.merge(graphdef, params, rest)(xs)

    def by_hand(params, xs):
        params = {path[0]: variable[...] for path, variable in nnx.to_flat_state(params)}
        for raw in [name for name in params if name.startswith("raw_")]:
            kept = jax.nn.sigmoid if raw.startswith("raw_decay") else jax.nn.softplus
            params[raw.removeprefix("raw_")] = kept(params.pop(raw))
        if name == "ParametricLIF":
            params["decay"] = 1 - jax.nn.sigmoid(params.pop("w"))  # 1 / tau = sigmoid(w), as SpikingJelly has it
        return snnfuse.unroll(layer.neuron, layer.params_type(**params), None, xs, implementation="scan")

    got, vjp = jax.vjp(by_module, params, xs)
    want, want_vjp = jax.vjp(by_hand, params, xs)
    assert_same_spikes(got[0], want[0]) if name != "LI" else assert_close(got[0], want[0], 1e-6)
    assert_close(got[1], want[1], 1e-6)
    leaves, tree = jax.tree.flatten(want)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    cotangents = tree.unflatten([jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)])
    (got_params, got_xs), (want_params, want_xs) = vjp(cotangents), want_vjp(cotangents)
    assert_close(got_params, want_params, 1e-5)
    assert_close(got_xs, want_xs, 1e-5)
    for path, gradient in nnx.to_flat_state(got_params):
        assert gradient[...].shape == (N,) and jnp.all(gradient[...] != 0), f"no gradient reaches {path}"
    assert len(jax.tree.leaves(got_params)) == len(layer.params_type._fields), "a learned parameter was left out"


@strict
@pytest.mark.parametrize("shape", [(), (N,), (B, N), (B, 1)])
def test_parametric_lif_shapes(shape):
    layer = nn.ParametricLIF(tau=4.0, shape=shape)
    assert layer.w[...].shape == shape
    np.testing.assert_allclose(layer.decay, 0.75, rtol=1e-6)
    np.testing.assert_allclose(layer.w[...], -np.log(3.0), rtol=1e-6)
    same = nn.LIF(tau=4.0, decay_input=True)
    xs = inputs(3.0)
    assert_fires(same(xs)[0])
    assert_same_spikes(layer(xs)[0], same(xs)[0])


@pytest.mark.parametrize(
    "layer, params",
    [
        (nn.IF(threshold=2.0), snnfuse.IFParams(threshold=2.0)),
        (nn.LIF(tau=4.0, threshold=2.0), snnfuse.LIFParams(decay=0.75, threshold=2.0)),
        (
            nn.CubaLIF(tau_syn=2.0, tau=4.0, threshold=3.0),
            snnfuse.CubaLIFParams(decay_syn=0.5, decay=0.75, threshold=3.0),
        ),
        (
            nn.AdaptiveLIF(tau=2.0, tau_adapt=4.0, beta=0.3, threshold=3.0),
            snnfuse.AdaptiveLIFParams(decay=0.5, decay_adapt=0.75, beta=0.3, threshold=3.0),
        ),
        (
            nn.ExpIF(tau=2.0, theta=0.7, delta=2.0, threshold=3.0),
            snnfuse.ExpIFParams(decay=0.5, theta=0.7, delta=2.0, threshold=3.0),
        ),
        (nn.Izhikevich(a=1, b=2, c=3, d=4, threshold=5), snnfuse.IzhikevichParams(a=1, b=2, c=3, d=4, threshold=5)),
        (nn.LI(decay=0.3), snnfuse.LIParams(decay=0.3)),
    ],
)
def test_arguments_reach_their_parameters(layer, params):
    assert layer.params == params and type(layer.neuron) is getattr(snnfuse, type(layer).__name__)


@strict
def test_what_is_not_learned_is_not_a_param():
    taus = jnp.linspace(1.5, 6.0, N)
    layer = nn.LIF(tau=taus, learn="threshold")
    assert set(nnx.state(layer, nnx.Param)) == {"raw_threshold"} and set(nnx.state(layer, nn.Fixed)) == {"decay"}
    assert jax.tree.leaves(nnx.state(nn.LIF(tau=2.0))) == [] and nn.LIF(tau=2.0).decay == 0.5
    xs = inputs(0.6)
    each = [nn.LIF(tau=float(tau))(xs[..., i : i + 1])[0] for i, tau in enumerate(taus)]
    assert_fires(layer(xs)[0])
    assert_same_spikes(layer(xs)[0], jnp.concatenate(each, -1))


@strict
def test_learned_per_neuron_values_are_kept():
    decay = jnp.linspace(0.1, 0.9, N)
    np.testing.assert_allclose(nn.LIF(decay=decay, learn="decay").decay, decay, rtol=1e-6)
    np.testing.assert_array_equal(nn.LIF(decay=decay, learn={"decay": "raw"}).decay[...], decay)


def test_a_parameter_that_is_learned_in_its_range_is_set_by_its_raw_array():
    layer = nn.LIF(decay=0.9, learn="decay")
    with pytest.raises(AttributeError, match=r"decay is sigmoid\(raw_decay\): set raw_decay\[...\], or learn="):
        layer.decay = 0.5
    layer.raw_decay[...] = jnp.zeros(())
    assert layer.decay == 0.5
    with pytest.raises(ValueError, match="decay must be above 0 and below 1 to be learned"):
        nn.LIF(decay=1 - 1e-9, learn="decay")  # 1 in float32


@pytest.mark.parametrize("out_dtype", [jnp.int8, jnp.bool_])
def test_without_a_gradient_numbers_stay_numbers(out_dtype):
    layer = nn.LIF(decay=0.9, threshold=1, out_dtype=out_dtype)
    xs = jnp.ones((4, 3))
    refusal, *_ = jax.make_jaxpr(lambda xs: layer(xs)[0])(xs).eqns
    assert len(refusal.invars) == 1, "xs alone: decay and threshold are compiled in"
    assert jax.jit(lambda xs: layer(xs)[0])(xs).dtype == out_dtype


def test_learned_parameters_stay_in_their_range():
    """The optimizer takes very large steps. Without bounds the decay would pass 1 and the threshold 0."""
    ranges = dict(decay=(0, 1), threshold=(0, jnp.inf), delta=(0, jnp.inf))
    layer = nn.ExpIF(decay=0.9, learn=("decay", "threshold", "delta"), shape=(2,))
    raw = nn.ExpIF(decay=0.9, learn={"decay": "raw", "threshold": "raw"}, shape=(2,))
    assert set(nnx.state(layer, nnx.Param)) == {"raw_decay", "raw_threshold", "raw_delta"}
    assert set(nnx.state(raw, nnx.Param)) == {"decay", "threshold"}
    for module in (layer, raw):
        optimizer = nnx.Optimizer(module, optax.sgd(1.0), wrt=nnx.Param)
        for sign in (1, -1):
            pushed = jax.tree.map(lambda p, sign=sign: sign * jnp.asarray([5.0, -10.0]), nnx.state(module, nnx.Param))
            optimizer.update(module, pushed)
            if module is layer:
                values = [getattr(layer.params, name) for name in ranges]
                assert all(
                    jnp.all((low < v) & (v < high)) for v, (low, high) in zip(values, ranges.values(), strict=True)
                )
            else:
                assert jnp.abs(raw.decay[...]).max() > 1
            optimizer.update(module, jax.tree.map(jnp.negative, pushed))
    np.testing.assert_allclose(layer.params.decay, 0.9, rtol=1e-5)
    assert nnx.merge(*nnx.split(layer)).params.threshold[1] == layer.threshold[1]
    copied = pickle.loads(pickle.dumps(layer))
    np.testing.assert_array_equal(copied.threshold, layer.threshold)


def conv_net(rngs, **options):
    return nn.Sequential(
        nnx.Conv(1, 4, (3, 3), rngs=rngs),
        nnx.BatchNorm(4, rngs=rngs),
        nn.LIF(tau=2.0, learn=("decay", "threshold"), shape=(4,), **options),
        partial(nnx.avg_pool, window_shape=(2, 2), strides=(2, 2)),
        nn.Sequential(nnx.Conv(4, 4, (3, 3), rngs=rngs), nn.AdaptiveLIF(tau=2.0, tau_adapt=5.0, threshold=0.3)),
        nn.flatten,
        nnx.Linear(4 * 3 * 3, 6, rngs=rngs),
        nn.ParametricLIF(tau=2.0, threshold=0.2, decay_input=False),
        nnx.Linear(6, 2, rngs=rngs),
        nn.LI(tau=2.0),
    )


@nnx.jit
def run(model, xs, state=None):
    return model(xs, state)


@pytest.fixture(scope="module")
def firing():
    model = conv_net(nnx.Rngs(0))
    xs = 2 * jax.random.normal(jax.random.key(3), (5, 2, 6, 6, 1))
    model.eval()
    _, spikes = nnx.jit(record)(model, xs)
    assert len(spikes) == 3
    for layer in spikes.values():
        assert_fires(layer)
    return model, xs


@pytest.fixture
def network(firing):
    model, xs = firing
    return nnx.clone(model), xs


@settings(deadline=None, max_examples=10)
@given(cuts=st.sets(st.integers(1, 4), max_size=3))
def test_pieces_in_turn_equal_the_whole(firing, cuts):
    model, xs = firing
    whole, last = run(model, xs)
    assert float(jnp.std(whole)) > 0.01
    pieces, state = [], None
    for piece in jnp.split(xs, sorted(cuts)):
        outs, state = run(model, piece, state)
        pieces.append(outs)
    assert_close(jnp.concatenate(pieces), whole, 1e-6)
    assert_close(state, last, 1e-6)


def test_state_matters(network):
    """Pieces that do not pass on the state give other spikes, so the test above can fail."""
    model, xs = network
    assert not np.allclose(run(model, xs)[0][3:], run(model, xs[3:])[0], rtol=1e-3)


def test_init_state_is_where_a_run_begins(network):
    model, xs = network
    state = model.init_state(jax.ShapeDtypeStruct(xs.shape, xs.dtype))
    assert_close(run(model, xs, state), run(model, xs), 1e-6)
    assert float(nn.ExpIF(tau=2.0, v_rest=-0.5).init_state(xs).v[0, 0, 0, 0]) == -0.5


def test_gradients_reach_every_parameter(network):
    model, xs = network
    target = jax.random.normal(jax.random.key(4), (2, 2))

    @nnx.jit
    def gradients(model, xs):
        return nnx.grad(lambda model: jnp.mean((nn.membrane_mean(model(xs)[0]) - target) ** 2))(model)

    model.train()
    found = nnx.to_flat_state(gradients(model, xs))
    assert {path[-1] for path, _ in found} == {"kernel", "bias", "scale", "raw_decay", "raw_threshold", "w"}
    before_batch_norm = (
        "layers",
        0,
        "bias",
    )  # the normalisation subtracts it again, so its gradient is only rounding
    dead = [path for path, g in found if not float(jnp.abs(g[...]).max()) > 1e-7 and path != before_batch_norm]
    assert dead == []


def test_dropout_has_one_mask_for_all_steps():
    xs = jnp.ones((6, 3, 40))
    dropped = nn.Sequential(nn.Dropout(0.5, rngs=nnx.Rngs(0)))(xs)[0]
    assert 0.3 < (dropped == 0).mean() < 0.7 and (dropped == dropped[0]).all()
    each = nn.Sequential(nnx.Dropout(0.5, rngs=nnx.Rngs(0)))(xs)[0]
    assert not (each == each[0]).all()
    layer = nn.Dropout(0.5, rngs=nnx.Rngs(0))
    layer.eval()
    np.testing.assert_array_equal(layer(xs), xs)


def test_batch_norm_sees_all_of_time(network):
    model, xs = network
    layer = nnx.BatchNorm(1, rngs=nnx.Rngs(0))
    outs = nn.Folded(layer)(xs)
    np.testing.assert_allclose(outs, (xs - xs.mean()) / jnp.sqrt(xs.var() + 1e-5), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(layer.mean[...], [0.01 * xs.mean()], rtol=1e-4)


def test_folded_is_the_layer_at_every_step(network):
    _, xs = network
    layer = nnx.Conv(1, 3, (3, 3), rngs=nnx.Rngs(0))
    assert_close(nn.Folded(layer)(xs), jnp.stack([layer(x) for x in xs]), 1e-6)
    both = nn.Folded(lambda pair: {"sum": pair[0] + pair[1]})((xs, xs))
    assert_close(both, {"sum": 2 * xs}, 0.0)


def test_trace_is_the_same_run_with_its_states(network):
    _, xs = network
    lif, xs = nn.LIF(tau=2.0), 0.5 * xs
    (spikes, states), state = lif.trace(xs)
    assert_close((spikes, state), lif(xs), 0.0)
    assert_fires(spikes)
    assert_close(states.v[-1], state.v, 0.0)
    assert float(jnp.abs(states.v * spikes).max()) == 0, "a hard reset leaves nothing where a spike was"


def test_nnx_transforms(network):
    model, xs = network
    whole, last = model(xs)
    assert_close(nnx.jit(lambda m, xs: m(xs))(model, xs), (whole, last), 1e-5)

    graphdef, state = nnx.split(model)
    assert_close(nnx.merge(graphdef, state)(xs), (whole, last), 0.0)

    @nnx.scan(in_axes=(nnx.Carry, None, 0), out_axes=(nnx.Carry, 0))
    def step(state, model, x):
        outs, state = model(x[None], state)
        return state, outs[0]

    stepped_state, stepped = step(model.init_state(xs), model, xs)
    assert_close(stepped, whole, 1e-5)
    assert_close(stepped_state, last, 1e-5)

    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def ensemble(rngs):
        return nn.Sequential(nnx.Linear(N, N, rngs=rngs), nn.LIF(tau=2.0, learn="decay"))

    models = ensemble(nnx.Rngs(0))
    currents = inputs(2.0)
    together, _ = nnx.vmap(lambda m, xs: m(xs), in_axes=(0, None))(models, currents)
    assert_fires(together)
    graphdef, state = nnx.split(models)
    for i in range(3):
        alone = nnx.merge(graphdef, jax.tree.map(lambda leaf, i=i: leaf[i], state))
        assert_same_spikes(together[i], alone(currents)[0])


def test_a_network_learns(network):
    """Two classes differ in which half of the input is active. The loss falls and the learned decay changes."""
    rngs = nnx.Rngs(0)
    model = nn.Sequential(
        nnx.Linear(8, 16, rngs=rngs), nn.ParametricLIF(threshold=0.5), nnx.Linear(16, 2, rngs=rngs), nn.LI(tau=2.0)
    )
    labels = jnp.arange(32) % 2
    rates = jnp.where(jnp.arange(8)[None] // 4 == labels[:, None], 0.5, 0.2)
    xs = (jax.random.uniform(jax.random.key(0), (20, 32, 8)) < rates).astype(jnp.float32)
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        def loss_of(model):
            logits = nn.membrane_mean(model(xs)[0])
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        loss, grads = nnx.value_and_grad(loss_of)(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(60)]
    assert losses[-1] < 0.3 * losses[0]
    assert abs(float(model.layers[1].w[...])) > 1e-3


READOUTS = (nn.spike_rate, nn.membrane_mean, nn.membrane_max, nn.membrane_last)


@pytest.mark.parametrize("read", READOUTS, ids=lambda f: f.__name__)
def test_sequences_of_other_lengths_are_read_out_as_if_alone(read):
    lengths = jnp.array([7, 1, 4])
    outs = jax.random.normal(jax.random.key(0), (7, 3, 2, 5))
    outs = (outs > 0) * 1.0 if read is nn.spike_rate else outs
    after = jnp.arange(7)[:, None] >= lengths
    for padding in (0.0, jnp.inf, -jnp.inf):
        padded = jnp.where(after[..., None, None], padding, outs)
        got = jax.jit(read)(padded, lengths)
        for b, n in enumerate([7, 1, 4]):
            np.testing.assert_allclose(got[b], read(outs[:n, b]), rtol=1e-6)
        assert bool(jnp.isfinite(jax.grad(lambda x: read(x, lengths).sum())(padded)).all())
    np.testing.assert_array_equal(read(outs, jnp.full(3, 7)), read(outs))


@pytest.mark.parametrize("read", READOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "lengths, message",
    [
        (
            [1, 2],
            r"lengths must be integers of shape \(3,\), one for each sequence of \(7, 3, 5\); got int32 of shape \(2,\)",
        ),
        ([1.0, 2.0, 3.0], "lengths must be integers .* got float32"),
        ([0, 2, 3], "lengths must be from 1 to T = 7; got 0 to 3"),
        ([1, 2, 8], "lengths must be from 1 to T = 7; got 1 to 8"),
    ],
)
def test_bad_lengths_are_named(read, lengths, message):
    with pytest.raises(ValueError, match=message):
        read(jnp.ones((7, 3, 5)), jnp.array(lengths))


@strict
def test_readouts():
    outs = jnp.asarray(np.random.default_rng(0).normal(size=(6, 2, 3)).astype(np.float32))
    host = np.asarray(outs)
    np.testing.assert_allclose(nn.membrane_mean(outs), host.mean(0), rtol=1e-5)
    np.testing.assert_array_equal(nn.membrane_max(outs), host.max(0))
    np.testing.assert_array_equal(nn.membrane_last(outs), host[-1])
    spikes = outs > 0.5
    assert_fires(spikes)
    for dtype in (bool, jnp.int8, jnp.bfloat16):
        rate = nn.spike_rate(spikes.astype(dtype))
        assert rate.dtype == jnp.float32
        np.testing.assert_allclose(rate, np.asarray(spikes).mean(0), rtol=1e-6)
    long = jnp.ones((300, 1), jnp.int8)  # 300 does not fit an int8, nor 257 a bfloat16
    assert float(nn.spike_rate(long)[0]) == float(nn.membrane_mean(long.astype(jnp.bfloat16))[0]) == 1.0


@strict
def test_dtypes():
    layer, xs = nn.LIF(tau=2.0, out_dtype=jnp.int8), inputs(0.6)
    assert_fires(layer(xs)[0])
    assert layer(xs)[0].dtype == jnp.int8 and layer(xs)[1].v.dtype == jnp.float32
    (spikes, states), _ = nn.LIF(tau=2.0).trace(xs.astype(jnp.bfloat16))
    assert spikes.dtype == jnp.bfloat16 and states.v.dtype == jnp.float32


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: nn.LIF(), ValueError, "give either tau or decay; got tau=None, decay=None"),
        (lambda: nn.LIF(tau=2.0, decay=0.5), ValueError, "give either tau or decay"),
        (lambda: nn.CubaLIF(tau=2.0), ValueError, "give either tau_syn or decay_syn"),
        (lambda: nn.LIF(tau=1.0), ValueError, "tau must be above 1 step.*got 1.0"),
        (lambda: nn.ParametricLIF(tau=0.5), ValueError, "tau must be above 1 step.*got 0.5"),
        (lambda: nn.LIF(decay=2.0), ValueError, r"decay must be in \[0, 1\]; got 2.0"),
        (lambda: nn.LIF(tau=2.0, learn="tau"), ValueError, r"learn must name .*\('decay', 'threshold'\); got 'tau'"),
        (lambda: nn.ParametricLIF(learn="decay"), ValueError, r"learn must name .*\('threshold',\); got 'decay'"),
        (
            lambda: nn.LIF(decay=1.0, learn="decay"),
            ValueError,
            "decay must be above 0 and below 1 to be learned by 'sigm",
        ),
        (
            lambda: nn.LIF(decay=0.0, learn="decay"),
            ValueError,
            "decay must be above 0.*got 0.0.*'raw'} learns it without",
        ),
        (
            lambda: nn.LIF(tau=2.0, threshold=-0.1, learn="threshold"),
            ValueError,
            "threshold must be above 0 and finite",
        ),
        (
            lambda: nn.LIF(tau=2.0, learn={"decay": "exp"}),
            ValueError,
            r"learn\['decay'\] must be one of sigmoid.*'exp'",
        ),
        (lambda: nn.LIF(tau=2.0, shape=(4,)), ValueError, "learn is empty; got shape"),
        (
            lambda: nn.LIF(decay=jnp.full(3, 0.5), learn="decay", shape=(4,)),
            ValueError,
            r"decay must broadcast to .*\(3,\)",
        ),
        (
            lambda: nn.LIF(tau=2.0, tua=2.0),
            TypeError,
            "LIF has no argument 'tua' .did you mean tau.*; it has tau, decay,",
        ),
        (lambda: nn.LIF(beta=0.9), TypeError, "no argument 'beta' .did you mean decay.*give either tau or decay"),
        (lambda: nn.LIF(tau=2.0, v_threshold=1.0), TypeError, "no argument 'v_threshold' .did you mean threshold"),
        (lambda: nn.LIF(tau=2.0, reset="soft"), TypeError, r"reset must be an object .*SoftReset\(\).*; got 'soft'"),
        (lambda: nn.LIF(tau=2.0, reset=snnfuse.SoftReset), TypeError, r"reset must be an object .*; got <class"),
        (lambda: nn.IF(surrogate="atan"), TypeError, r"surrogate must be an object .*ATan\(\).*; got 'atan'"),
        (
            lambda: snnfuse.unroll(snnfuse.IF("soft"), snnfuse.IFParams(), None, jnp.ones((2, 3))),
            TypeError,
            "reset must be an object",
        ),
        (lambda: nn.Spiking(snnfuse.LIF(), {"decay": 0.5}), TypeError, "params must be a NamedTuple"),
        (lambda: nn.Sequential(nnx.relu, 3), TypeError, "layer 1 must be callable; got 3"),
        (lambda: nn.Folded(nn.IF()), TypeError, "Folded takes a layer without time; IF"),
        (lambda: nn.Folded(nnx.relu)(jnp.ones((4, 5))), ValueError, r"xs must be \[T, B, ...\].*relu.*\(4, 5\)"),
        (lambda: nn.Folded(jnp.sum)(jnp.ones((4, 5, 6))), ValueError, r"sum must keep the first axis, T\*B = 20"),
        (lambda: nn.Sequential(nn.IF())(jnp.ones((4, 5, 6)), ()), ValueError, "state must have 1 entries.*got 0"),
        (
            lambda: nn.Sequential(nn.IF(), nnx.Linear(7, 3, rngs=nnx.Rngs(0)))(jnp.ones((4, 5, 6))),
            ValueError,
            r"layer 1, Linear, takes 7 features, the last axis; its input is \(4, 5, 6\)",
        ),
        (
            lambda: nn.Sequential(nnx.Conv(2, 3, (3, 3), rngs=nnx.Rngs(0)))(jnp.ones((4, 5, 6, 6, 1))),
            ValueError,
            r"layer 0, Conv, takes 2 features, the last axis; its input is \(4, 5, 6, 6, 1\)",
        ),
        (
            lambda: nn.Sequential(nnx.BatchNorm(2, rngs=nnx.Rngs(0)))(jnp.ones((4, 5, 6))),
            ValueError,
            "layer 0, BatchNorm, takes 2 features",
        ),
        (lambda: nn.IF(implementation="cuda")(jnp.ones((4, 5, 6))), ValueError, "implementation must be"),
    ],
)
def test_bad_input_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_time_conv_sees_its_own_step_and_those_before():
    xs = jax.random.normal(jax.random.key(0), (7, 2, 5, 3))
    layer = nn.TimeConv(3, 4, (3, 3), strides=(2,), use_bias=True, rngs=nnx.Rngs(0))
    outs, state = layer(xs)
    padded = np.pad(np.asarray(xs, np.float64), ((2, 0), (0, 0), (1, 1), (0, 0)))
    kernel, bias = np.asarray(layer.conv.kernel[...], np.float64), np.asarray(layer.conv.bias[...])
    want = np.zeros((7, 2, 3, 4))
    for t in range(7):
        for i, at in enumerate((0, 2, 4)):
            want[t, :, i] = np.einsum("kbsi,ksio->bo", padded[t : t + 3, :, at : at + 3], kernel) + bias
    np.testing.assert_allclose(outs, want, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(state, xs[-2:])
    first, state = layer(xs[:1])
    second, state = layer(xs[1:4], state)
    third, _ = layer(xs[4:], state)
    np.testing.assert_allclose(jnp.concatenate([first, second, third]), outs, rtol=1e-5, atol=1e-6)
    for make, match in (
        (lambda: nn.TimeConv(3, 4, (3, 2), rngs=nnx.Rngs(0)), r"each of the others odd; got \(3, 2\)"),
        (
            lambda: nn.TimeConv(3, 4, (3, 3), strides=(1, 1), rngs=nnx.Rngs(0)),
            "strides must have one number for each of 1",
        ),
        (lambda: nn.TimeConv(3, 4, 3, rngs=nnx.Rngs(0)), r"kernel must be \(K, \*taps\), .*; got 3"),
        (lambda: layer(xs[:, :, 0]), r"xs must be \[T, B, \*space, I\], of rank 4"),
        (lambda: layer(xs, state[:1]), "state must be the input of the last 2 steps"),
    ):
        with pytest.raises((TypeError, ValueError), match=match):
            make()


def test_time_conv_computes_in_the_dtype_that_it_is_given():
    xs = jax.random.normal(jax.random.key(0), (3, 2, 4), jnp.bfloat16)
    half, full = (nn.TimeConv(4, 2, (2,), dtype=dtype, rngs=nnx.Rngs(0)) for dtype in (jnp.bfloat16, None))
    assert half(xs)[0].dtype == jnp.bfloat16 and full(xs)[0].dtype == jnp.float32
    np.testing.assert_allclose(half(xs)[0].astype(jnp.float32), full(xs)[0], atol=0.05)
