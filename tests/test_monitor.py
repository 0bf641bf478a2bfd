"""Monitors: records equal what the layers compute, a run without a monitor does not change, operations are counted right."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import assert_fires, assert_same_spikes
from flax import nnx

import snnfuse as sf
from snnfuse import nn, online
from snnfuse.nn import monitor

T, B = 12, 3


class Block(nnx.Module):
    """A residual block that is not a Sequential and names its own neurons."""

    def __init__(self, n, rngs):
        self.linear, self.norm = nnx.Linear(n, n, rngs=rngs), nnx.BatchNorm(n, rngs=rngs)
        self.neurons = nnx.Dict(one=nn.LIF(tau=2.0), two=nn.CubaLIF(tau_syn=2.0, tau=2.0, threshold=2.0))

    def __call__(self, xs):
        s, _ = self.neurons["one"](self.norm(self.linear(xs)))
        return self.neurons["two"](s + xs)[0]


class Net(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.block, self.head = Block(6, rngs), nnx.Linear(6, 2, rngs=rngs)
        self.out = nn.LI(tau=2.0)

    def __call__(self, xs):
        return self.out(self.head(self.block(xs)))


def inputs(*shape, seed=0):
    return 0.5 + jax.random.normal(jax.random.key(seed), (T, B, *shape))


def test_spikes_and_states_of_any_module():
    model, xs = Net(), inputs(6)
    (outs, _), spikes = monitor.record(model, xs)
    assert list(spikes) == ["block.neurons.one", "block.neurons.two"]
    _, state = monitor.record(model, xs, what="state", layers=["block.neurons.two", "out"])
    block = model.block
    normed = nnx.clone(block).norm(block.linear(xs))
    one, _ = block.neurons["one"](normed)
    (two, states), _ = block.neurons["two"].trace(one + xs)
    assert_fires(two)
    assert_same_spikes(spikes["block.neurons.one"], one)
    assert_same_spikes(spikes["block.neurons.two"], two)
    assert list(state) == ["block.neurons.two", "out"]
    for got, want in zip(state["block.neurons.two"], states, strict=True):
        np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(state["out"].v, outs)


def test_a_monitor_leaves_nothing_behind():
    """A monitor changes neither the jaxpr of a run nor the model's arrays, some of which BatchNorm writes in training."""
    model, xs = Net(), inputs(6)
    graphdef, before = nnx.split(model)
    run = lambda: str(jax.make_jaxpr(lambda state, xs: nnx.merge(graphdef, state)(xs))(before, xs))
    jaxpr, arrays = run(), jax.tree.map(jnp.copy, before)
    monitor.record(model, xs, what="state")
    monitor.operations(model, xs)
    assert nnx.graphdef(model) == graphdef and run() == jaxpr
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), arrays)


def test_under_jit_with_named_arguments():
    model, xs = nn.Sequential(nnx.Linear(4, 5, rngs=nnx.Rngs(0)), nn.LIF(tau=2.0)), inputs(4)

    @nnx.jit
    def rate(model, xs):
        _, spikes = monitor.record(model, xs, state=(nn.LIF(tau=2.0).neuron.init_state((B, 5)),))
        return monitor.firing_rates(spikes)["layers.1"]

    np.testing.assert_allclose(rate(model, xs), model(xs)[0].mean(), rtol=1e-6)
    with pytest.raises(TypeError, match="record must not be differentiated.*copy of the model; use .*monitor.watch"):
        nnx.grad(rate)(model, xs)


def test_watch_records_the_model_itself_in_training():
    """A rate penalty: its gradient, a new dropout mask each call, BatchNorm statistics that move; also of lean layers."""
    rngs = nnx.Rngs(0)
    lean = nn.Remat(nn.Sequential(nn.Linear(5, 5, rngs=rngs), nn.LIF(tau=2.0)))
    first = [nn.Linear(4, 5, rngs=rngs), nn.BatchNorm(5, rngs=rngs), nn.Dropout(0.5, rngs=rngs), nn.LIF(tau=2.0)]
    model, xs = nn.Sequential(*first, lean), inputs(4)

    def penalised(model, xs):
        with monitor.watch(model) as spikes:
            outs, _ = model(xs)
        rates = monitor.firing_rates(spikes)
        return rates["layers.3"] + rates["layers.4.layer.layers.1"], (outs, spikes)

    @nnx.jit
    def step(model, xs):
        (_, (outs, spikes)), gradients = nnx.value_and_grad(penalised, has_aux=True)(model, xs)
        return outs, spikes, gradients

    before, graphdef = jnp.copy(model.layers[1].mean[...]), nnx.graphdef(model)
    outs, spikes, gradients = step(model, xs)
    assert_fires(spikes["layers.3"])
    assert_same_spikes(spikes["layers.4.layer.layers.1"], outs)
    assert jnp.any(gradients.layers[0].kernel[...] != 0)
    assert jnp.any(model.layers[1].mean[...] != before)
    assert jnp.any(step(model, xs)[1]["layers.3"] != spikes["layers.3"]), "the same mask twice"
    assert nnx.graphdef(model) == graphdef and type(lean) is nn.Remat and "unroll" not in vars(model.layers[3])


def test_packed_spikes_and_layers_called_in_pieces():
    layer, xs = nn.LIF(tau=2.0, out_dtype=sf.Packed(8)), inputs(4)
    plain, _ = nn.LIF(tau=2.0)(xs)
    _, spikes = monitor.record(nn.Sequential(layer), xs)
    assert_same_spikes(spikes["layers.0"], plain)
    _, states = monitor.record(nn.Sequential(layer), xs, what="state")
    np.testing.assert_array_equal(states["layers.0"].v, nn.LIF(tau=2.0).trace(xs)[0][1].v)

    class Twice(nnx.Module):
        def __init__(self):
            self.neuron = nn.LIF(tau=2.0)

        def __call__(self, xs):
            first, state = self.neuron(xs[:5])
            return jnp.concatenate([first, self.neuron(xs[5:], state)[0]])

    outs, spikes = monitor.record(Twice(), xs)
    assert_same_spikes(spikes["neuron"], plain)
    assert_same_spikes(outs, plain)


def test_rates_and_dead_neurons():
    spikes = np.zeros((4, 2, 5), np.float32)
    spikes[0, 0, 0] = spikes[1, 1, 1] = spikes[2, 0, 1] = 1
    assert monitor.firing_rates({"a": spikes})["a"] == np.float32(3 / 40)
    assert monitor.firing_rates({"a": jnp.asarray(spikes, bool)})["a"] == np.float32(3 / 40)
    assert monitor.dead_neurons({"a": spikes})["a"] == np.float32(3 / 5)


def count_by_hand(x, kernel, stride, low, out):
    """Count one by one the products of the nonzero inputs [N, H, W, C] with a kernel [k, k, C / groups, outs]."""
    k, _, per_group, outs = kernel
    total = 0
    for _, h, w, _ in zip(*np.nonzero(x), strict=True):
        for i in range(out[0]):
            for j in range(out[1]):
                if 0 <= h + low - i * stride < k and 0 <= w + low - j * stride < k:
                    total += outs * per_group // x.shape[-1]
    return total


@pytest.mark.parametrize(
    "stride, padding, groups", [(1, "SAME", 1), (2, "SAME", 1), (1, "VALID", 1), (2, ((2, 2), (2, 2)), 2)]
)
def test_operations_of_a_convolution_at_its_borders(stride, padding, groups):
    conv = nnx.Conv(2, 4, (3, 3), strides=stride, padding=padding, feature_group_count=groups, rngs=nnx.Rngs(0))
    x = np.asarray(jax.random.bernoulli(jax.random.key(1), 0.3, (2, 1, 5, 6, 2)), np.float32)
    low = {"VALID": 0, "SAME": jax.lax.padtype_to_pads((5,), (3,), (stride,), "SAME")[0][0]}.get(padding, 2)
    if padding == "SAME" and stride == 2:  # 5 rows are padded by 1 and 1, 6 columns by 0 and 1
        x = x[..., :5, :]
    out = conv(x[0]).shape[1:3]
    rows = x.reshape(-1, *x.shape[2:])
    want = count_by_hand(rows, conv.kernel_shape, stride, low, out)
    assert want > 0
    assert monitor.operations(nn.Sequential(conv), jnp.asarray(x)) == {"layers.0": (want, 0)}
    want = count_by_hand(np.ones_like(rows), conv.kernel_shape, stride, low, out)
    assert monitor.operations(nn.Sequential(conv), jnp.asarray(x) - 0.5) == {"layers.0": (0, want)}


@pytest.mark.parametrize("kind", [nnx.Conv, nn.Conv])
@pytest.mark.parametrize(
    "size, options",
    [
        ((3, 2), dict(strides=(2, 1))),
        ((3, 3), dict(padding="VALID", kernel_dilation=(1, 2))),
        ((4, 3), dict(padding="CIRCULAR", strides=2)),
        ((3, 5), dict(padding="REFLECT", kernel_dilation=2)),
        ((3, 3), dict(padding=((2, -1), (-1, 3)), input_dilation=(2, 3), strides=(1, 2))),
        ((2, 3), dict(feature_group_count=3, mask=np.arange(2 * 3 * 2 * 9).reshape(2, 3, 2, 9) % 4 == 0)),
        (3, dict(padding="CAUSAL", kernel_dilation=2)),
        ((2, 3, 2), dict(padding=1)),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_the_products_of_any_convolution_are_the_gradient_with_weights_of_one(kind, size, options):
    if "mask" in options:
        options = options | dict(mask=jnp.asarray(options["mask"], jnp.float32))
    conv = kind(6, 9, size, **options, rngs=nnx.Rngs(0))
    shape = (7, 6, 5)[: 1 if size == 3 else len(size)]
    ones = nnx.clone(conv)
    ones.kernel[...] = jnp.ones_like(ones.kernel[...])
    want = np.asarray(jax.grad(lambda x: ones(x).sum())(jnp.zeros((1, *shape, 6))))
    x = np.asarray(jax.random.bernoulli(jax.random.key(2), 0.4, (3, *shape, 6)), np.float32)
    assert len(np.unique(want)) > 1 or options.get("padding") == "CIRCULAR"
    assert monitor.operations(nnx.Sequential(conv), x) == {"layers.0": ((x * want).sum(), 0)}
    assert monitor.operations(nnx.Sequential(conv), x - 0.5) == {"layers.0": (0, 3 * want.sum())}


class Inside(nnx.Module):
    """A model that applies a transform itself."""

    def __init__(self, transform):
        self.linear, self.transform = nn.Linear(6, 6, rngs=nnx.Rngs(0)), transform

    def __call__(self, xs):
        return self.transform(lambda xs: self.linear(xs))(xs)


@pytest.mark.parametrize("transform", [jax.jit, jax.checkpoint, jax.vmap])
def test_operations_inside_of_a_transform_are_refused(transform):
    with pytest.raises(ValueError, match="operations must be called outside of jax.jit .*; got a tracer"):
        monitor.operations(Inside(transform), inputs(6))
    assert monitor.operations(Inside(lambda f: f), inputs(6)) == {"linear": (0, T * B * 36)}


def test_arguments_of_the_model_that_are_no_arrays():
    class Chooses(nnx.Module):
        def __init__(self):
            self.linear = nn.Linear(6, 6, rngs=nnx.Rngs(0))

        def __call__(self, xs, twice=False, *, name=None):
            return self.linear(self.linear(xs)) if twice or name == "twice" else self.linear(xs)

    once = {"linear": (0, T * B * 36)}
    assert monitor.operations(Chooses(), inputs(6)) == once
    for args, kwargs in (((True,), {}), ((), dict(twice=True)), ((), dict(name="twice"))):
        assert monitor.operations(Chooses(), inputs(6), *args, **kwargs) == {"linear": (0, 2 * T * B * 36)}


def test_a_model_with_attributes_or_arguments_that_have_no_hash():
    class Scaled(nnx.Module):
        def __init__(self):
            self.linear = nn.Linear(6, 6, rngs=nnx.Rngs(0))
            self.scale, self.options = np.ones(6, np.float32), {"bits": 4}

        def __call__(self, xs, names=frozenset()):
            return self.linear(xs * self.scale)

    for _ in range(2):
        assert monitor.operations(Scaled(), inputs(6), names={"a"}) == {"linear": (0, T * B * 36)}


def test_operations_of_a_network():
    """The first layer's inputs are not spikes, the second layer's are. The energy follows the formula."""
    model = nn.Sequential(
        nnx.Linear(7, 5, rngs=nnx.Rngs(0)), nn.LIF(tau=2.0, threshold=0.3), nnx.Linear(5, 3, rngs=nnx.Rngs(1))
    )
    xs = inputs(7)
    spikes = monitor.record(model, xs)[1]["layers.1"]
    assert_fires(spikes)
    got = monitor.operations(model, xs)
    assert got == {"layers.0": (0, T * B * 7 * 5), "layers.2": (int(spikes.sum()) * 3, 0)}
    assert got["layers.0"].joules == pytest.approx(T * B * 35 * 4.6e-12)
    assert got["layers.2"].joules == pytest.approx(float(spikes.sum()) * 3 * 0.9e-12)


def test_fused_normalisation_bits_and_rematerialisation():
    """Layers of snnfuse.nn: a neuron fused with its normalisation, packed spikes, and a lean block."""
    rngs = nnx.Rngs(0)
    first = nn.NormSpiking(nn.LIF(tau=2.0), nn.BatchNorm(3, rngs=rngs), pack=True)
    block = nn.Sequential(nn.Conv(3, 4, (3, 3), rngs=rngs, dtype="bfloat16"), nn.IF())
    model = nn.Sequential(
        nn.Conv(2, 3, (3, 3), rngs=rngs), first, nn.Remat(block), nn.mean_pool, nn.Linear(4, 5, rngs=rngs)
    )
    xs = inputs(5, 6, 2)
    (outs, _), spikes = nnx.jit(lambda model, xs: monitor.record(model, xs))(model, xs)
    np.testing.assert_array_equal(outs, nnx.jit(lambda model, xs: model(xs)[0])(nnx.clone(model), xs))
    kept = spikes["layers.1.neuron"]
    want, _ = nnx.clone(first)(model.layers[0](xs))
    assert list(spikes) == ["layers.1.neuron", "layers.2.layer.layers.1"]
    assert_same_spikes(kept, want.values)
    got = monitor.operations(model, xs)
    dense = count_by_hand(np.ones((1, 5, 6, 2)), (3, 3, 2, 3), 1, 1, (5, 6))
    sparse = count_by_hand(np.asarray(kept).reshape(-1, 5, 6, 3), (3, 3, 3, 4), 1, 1, (5, 6))
    assert got == {
        "layers.0": (0, T * B * dense),
        "layers.2.layer.layers.0": (sparse, 0),
        "layers.4": (0, T * B * 4 * 5),
    }


def test_bad_arguments():
    model, xs = Net(), inputs(6)
    with pytest.raises(ValueError, match="operations must be called outside of jax.jit .*; got a tracer"):
        nnx.jit(monitor.operations)(model, xs)
    with pytest.raises(ValueError, match="what must be 'spikes', 'state', 'membrane' or 'counts'; got 'v'"):
        monitor.record(model, xs, what="v")
    with pytest.raises(
        ValueError, match=r"layers must be a list of paths of spiking layers, from \['block.*got 'head'"
    ):
        monitor.record(model, xs, layers=["out", "head"])
    with pytest.raises(ValueError, match="layers must be a list.*got 'out'"):
        monitor.record(model, xs, layers="out")
    with pytest.raises(
        ValueError, match=r"spikes of 'a' must be \[T, B, ..., N\], of rank 3 or more; got shape \(4, 5\)"
    ):
        monitor.dead_neurons({"a": np.zeros((4, 5))})


def test_the_membrane_before_the_reset():
    """It reaches the threshold exactly where the neuron spikes, and the reset of it is the state's v."""
    rngs, xs = nnx.Rngs(0), 2 * jax.random.normal(jax.random.key(0), (12, 3, 4))
    hard, soft = nn.LIF(tau=2.0, reset=sf.HardReset(-0.5)), nn.AdaptiveLIF(tau=2.0, tau_adapt=4.0, reset=sf.SoftReset())
    model = nn.Sequential(nn.NormSpiking(hard, nn.BatchNorm(4, rngs=rngs)), soft, nn.LI(tau=2.0))
    u, v, s = (monitor.record(model, xs, what=what)[1] for what in ("membrane", "state", "spikes"))
    first, second = u
    np.testing.assert_array_equal(u[first] >= 1, s[first] > 0)
    np.testing.assert_allclose(v[first].v, np.where(s[first] > 0, -0.5, u[first]), atol=1e-6)
    before = np.concatenate([np.zeros((1, 3, 4)), v[second].a[:-1]])
    np.testing.assert_array_equal(u[second] >= np.float32(1 + 0.2 * before), s[second] > 0)
    assert 0.02 < np.mean(s[first]) < 0.6 and np.max(u[first]) > 1
    with pytest.raises(ValueError, match="Izhikevich has no field `reset`"):
        monitor.record(nn.Sequential(nn.Izhikevich()), xs, what="membrane")


class Counts(nnx.Module):
    """Bits, a shortcut inside of a kernel, a Recurrent, and a layer that is called twice, with a state."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.norm = nn.NormSpiking(nn.LIF(tau=2.0), nn.BatchNorm(6, rngs=rngs), connect="and", pack=True)
        self.loop = nn.Recurrent(nn.AdaptiveLIF(tau=2.0, tau_adapt=9.0), 6, rngs=rngs)
        self.last = nn.LIF(tau=3.0)

    def __call__(self, xs):
        first, _ = self.norm(2 * xs, None, (xs[:, ::-1] > 0.3).astype(xs.dtype))
        second, state = self.loop(3 * first.values + xs)
        third, state = self.loop(3 * first.values, state)
        once, state = self.last(second + third + xs)
        return self.last(second + once, state)[0]


def test_counts_are_the_sums_of_spikes_and_carry_their_gradients():
    model, xs, weights = Counts(), inputs(6), jax.random.normal(jax.random.key(5), (2, B, 6))

    def loss(model, what):
        with monitor.watch(model, what=what) as records:
            outs = model(xs)
        sums = {path: r if what == "counts" else r.astype(jnp.float32).sum(0) for path, r in records.items()}
        return sum((w * sums[path]).sum() for w, path in zip(weights, ("loop", "last"), strict=True)), (outs, sums)

    grad = lambda what: nnx.grad(lambda model: loss(model, what), has_aux=True)(nnx.clone(model))
    (ours, (outs, counts)), (theirs, (want_outs, sums)) = grad("counts"), grad("spikes")
    assert_same_spikes(outs, want_outs)
    for path in ("loop", "last"):
        np.testing.assert_array_equal(counts[path], sums[path])
        assert 0.02 < float(counts[path].mean()) / (2 * T) < 0.6
    ours, theirs = (dict(nnx.to_flat_state(g)) for g in (ours, theirs))
    assert ours.keys() == theirs.keys()
    for path, got in ours.items():
        assert jnp.abs(theirs[path][...]).max() > 0.01, path
        np.testing.assert_allclose(got[...], theirs[path][...], rtol=1e-4, atol=1e-4)
    norm = next(path for path in counts if path.startswith("norm"))
    assert (counts[norm] >= sums[norm]).all() and (counts[norm] > sums[norm]).any()  # the shortcut lets only some pass


def test_counts_store_nothing_over_time():
    layer, xs = nn.LIF(tau=2.0, learn="decay", implementation="interpret"), jnp.ones((256, 2, 64))

    def stored(what):
        def run(layer):
            with monitor.watch(layer, what=what) as records:
                layer(xs)
            (record,) = records.values()
            return record.sum()

        graph, state = nnx.split(layer)
        return sum(
            x.size
            for x in jax.tree.leaves(jax.eval_shape(lambda s: jax.vjp(lambda s: run(nnx.merge(graph, s)), s)[1], state))
        )

    assert stored("counts") < 1.5 * xs.size  # xs itself, and a few states
    assert stored("spikes") < 1.5 * xs.size


def test_counts_are_of_spikes_and_not_of_what_drop_path_makes_of_them():
    """The gate of drop-path is 0 or 2 for a sample; its neurons spike all the same."""
    rngs = nnx.Rngs(0)
    options = {"connect": "add", "drop_path": nnx.Dropout(0.5, rngs=rngs)}
    layer = nn.NormSpiking(nn.LIF(tau=2.0), nn.BatchNorm(5, rngs=rngs), **options)
    xs = 2 * jax.random.normal(jax.random.key(0), (9, 8, 5))
    with monitor.watch(layer, what="counts") as counts:
        outs, _ = layer(xs, shortcut=jnp.zeros_like(xs))
    spikes = nn.NormSpiking(nn.LIF(tau=2.0), nn.BatchNorm(5, rngs=rngs), connect="add")(
        xs, shortcut=jnp.zeros_like(xs)
    )[0]
    assert_fires(spikes)
    assert (outs == 0).all((0, 2)).any() and (outs == 2).any()
    np.testing.assert_array_equal(counts["neuron"], spikes.sum(0))


def test_the_readout_of_an_online_network_is_not_recorded():
    """`online.sltt` wraps its LI, whose membrane is no spike: a rate penalty would be on the outputs."""
    layers = nn.Linear(5, 6, rngs=nnx.Rngs(0)), nn.LIF(tau=2.0), nn.Linear(6, 3, rngs=nnx.Rngs(0)), nn.LI(tau=2.0)
    for what in ("spikes", "counts"):
        assert list(monitor.record(online.sltt(nn.Sequential(*layers)), jnp.ones((4, 2, 5)), what=what)[1]) == [
            "layers.1"
        ]
