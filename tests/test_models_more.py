"""More tests of the networks: shapes, learning, sequences in pieces, attention, transposes in a training step on a GPU, errors."""

import re
from functools import partial

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compare import assert_close
from flax import nnx
from test_ops_kernels import h100

from snnfuse import models, nn
from snnfuse.models.build import rising

FAMILIES = {  # (a small network, the size of its images, a learning rate)
    "sew_resnet": (partial(models.sew_resnet, 18, stem="cifar"), 8, 3e-3),
    "membrane": (partial(models.spiking_resnet, 18, stem="cifar", connect="membrane"), 8, 3e-3),
    "spiking_vgg": (partial(models.spiking_vgg, 11, hidden=64, neuron=partial(nn.LIF, tau=2.0)), 32, 1e-2),
    "spikformer": (partial(models.spikformer, depth=1, width=32, heads=2), 8, 3e-3),
}
RESNETS = [
    (18, "imagenet", "sum"),
    (18, "cifar", "sum"),
    (19, "cifar", "sum"),
    (34, "cifar", "sum"),
    (50, "imagenet", "sum"),
]
RESNETS += [(18, "imagenet", "add"), (34, "imagenet", "and"), (50, "cifar", "iand")]
RESNETS += [(18, "imagenet", "membrane"), (19, "cifar", "membrane"), (50, "cifar", "membrane")]


def shape_of(make, *shape, dtype=jnp.float32):
    """(shape, dtype) of the outputs, without computing them."""
    model = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
    outs = nnx.eval_shape(lambda model, xs: model(xs)[0], model, jax.ShapeDtypeStruct(shape, dtype))
    return outs.shape, outs.dtype


@pytest.mark.parametrize("depth, stem, connect", RESNETS)
def test_shapes_of_resnets(depth, stem, connect):
    family = models.spiking_resnet if connect in ("sum", "membrane") else models.sew_resnet
    make = partial(family, depth, 2, 10, stem=stem, connect=connect, policy="bfloat16")
    assert shape_of(make, 3, 2, 40, 33, 2) == ((3, 2, 10), jnp.float32)


@pytest.mark.parametrize("memory", ["fast", "packed", "lean"])
@pytest.mark.parametrize("policy", ["float32", "bfloat16"])
def test_shapes_of_vgg_and_transformers(memory, policy):
    """Both depths and both patches meet each memory setting; a layer does not know how many others there are."""
    options, depth, patch = dict(memory=memory, policy=policy), *((11, 1) if policy == "float32" else (16, 16))
    make = partial(models.spiking_vgg, depth, 2, 10, **options)
    assert shape_of(make, 3, 2, 40, 33, 2) == ((3, 2, 10), jnp.float32)
    make = partial(models.spikformer, 2, 10, depth=1, patch=patch, **options)
    assert shape_of(make, 3, 2, 16, 33, 2) == ((3, 2, 10), jnp.float32)
    make = partial(models.qkformer, 2, 10, depth=3, width=32, **options)
    assert shape_of(make, 3, 2, 16, 33, 2) == ((3, 2, 10), jnp.float32)


def test_qkformer_has_the_parameters_of_the_authors():
    """Their HST-4-384 for 10 classes has 6,706,234. Of these, 6,336 are biases that the next normalisation cancels."""
    model = nnx.eval_shape(lambda: models.qkformer(3, 10, rngs=nnx.Rngs(0)))
    biases = sum(6 * width for width in (96, 192, 384, 384))  # of the projection, and of the MLP's 4 width + width
    assert sum(p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param))) == 6_706_234 - biases


@pytest.mark.parametrize("blocks, want", [(0, []), (1, [0.7]), (2, [0, 0.7]), (3, [0, 0.35, 0.7])])
def test_drop_path_of_the_last_block_is_the_rate_itself_also_if_it_is_the_only_one(blocks, want):
    np.testing.assert_allclose(rising(0.7, blocks), want)


def test_drop_path_rises_over_the_blocks():
    sew = partial(models.sew_resnet, 18, 3, 10, stem="cifar", drop_path=0.7)
    spikformer = partial(models.spikformer, 3, 10, depth=2, width=16, heads=2, drop_path=0.7, memory="lean")
    qkformer = partial(models.qkformer, 3, 10, depth=3, width=32, heads=2, drop_path=0.7)
    wanted = [0.1 * i for i in range(1, 8)], [0.7, 0.7], [0.35, 0.35, 0.7, 0.7]
    for make, want in zip((sew, spikformer, qkformer), wanted, strict=True):
        model = nnx.eval_shape(lambda make=make: make(rngs=nnx.Rngs(0)))
        rates = [module.rate for _, module in nnx.iter_modules(model) if isinstance(module, nnx.Dropout)]
        np.testing.assert_allclose(sorted(rates), want)
        assert shape_of(make, 2, 3, 8, 8, 3) == ((2, 3, 10), jnp.float32)


@pytest.mark.parametrize("widens", [False, True])
def test_membrane_shortcut_adds_the_input_currents(widens):
    neuron = lambda: nn.NormSpiking(nn.LIF(tau=2.0), nn.BatchNorm(4, gain=8.0, rngs=nnx.Rngs(0)))
    dense = lambda features, key: nnx.Linear(4, features, rngs=nnx.Rngs(key))
    first, second, convolutions = neuron(), neuron(), (dense(4, 1), dense(6 if widens else 4, 2))
    beside = dense(6, 3) if widens else None
    block = models.MembraneResidual(first, nn.Sequential(convolutions[0], second, convolutions[1]), beside)
    block.eval()
    xs = jax.random.normal(jax.random.key(0), (3, 5, 4))
    spikes, _ = first(xs)
    inner, _ = second(convolutions[0](spikes))
    want = convolutions[1](inner) + (beside(spikes) if widens else xs)
    assert 0.1 < float(spikes.mean()) < 0.9 and float(inner.mean()) > 0
    np.testing.assert_array_equal(block(xs)[0], want)
    padded, _ = block(nn.Padded(xs, jnp.array([3, 1, 2, 3, 1])))
    for i, length in enumerate(padded.lengths):
        np.testing.assert_array_equal(padded.values[:length, i], want[:length, i])


@pytest.fixture
def narrow(monkeypatch):
    """Make the networks a quarter as wide, and a ResNet of two stages with a block each; `test_shapes_of_resnets` builds all."""
    quarter = lambda widths: tuple(width // 4 for width in widths)
    monkeypatch.setattr(models.resnet, "WIDTHS", quarter(models.resnet.WIDTHS))
    monkeypatch.setitem(models.resnet.DEPTHS, 18, (1, 1, 0, 0))
    monkeypatch.setitem(models.vgg.STAGES, 11, tuple(map(quarter, models.vgg.STAGES[11])))


def step_of(loss_of):
    @nnx.jit
    def step(model, optimizer, xs, labels):
        loss, grads = nnx.value_and_grad(loss_of)(model, xs, labels)
        optimizer.update(model, grads)
        return loss

    return step


def loss_of(model, xs, labels):
    logits = nn.membrane_mean(model(xs)[0])
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@pytest.mark.parametrize("family", FAMILIES)
def test_learns_four_images(family, narrow):
    make, size, rate = FAMILIES[family]
    model = make(2, 4, rngs=nnx.Rngs(0))
    model.train()
    optimizer = nnx.Optimizer(model, optax.adam(rate), wrt=nnx.Param)
    images = jax.random.normal(jax.random.key(0), (4, size, size, 2))
    step, xs, labels = step_of(loss_of), jnp.stack([images] * 2), jnp.arange(4)
    losses = [float(step(model, optimizer, xs, labels)) for _ in range(16)]
    assert np.isfinite(losses).all() and min(losses[-3:]) < 0.8 * losses[0], losses


@pytest.mark.parametrize("family", ["membrane", "spiking_vgg", "spikformer", "qkformer"])
def test_pieces_in_turn_equal_the_whole(family, narrow):
    make, size, _ = (FAMILIES | dict(qkformer=(partial(models.qkformer, depth=3, width=16, heads=2), 8, None)))[family]
    model = make(2, 4, rngs=nnx.Rngs(0))
    for _, norm in nnx.iter_modules(model):
        if isinstance(norm, nn.BatchNorm):
            norm.var[...] = jnp.full_like(norm.var[...], 2e-4)  # so that an untrained network fires
    model.eval()
    xs = jax.random.normal(jax.random.key(0), (4, 1, size, size, 2))
    run = nnx.jit(lambda model, xs, state: model(xs, state))
    start = model.init_state(xs)
    whole, last = run(model, xs, start)
    first, between = run(model, xs[:2], start)
    second, state = run(model, xs[2:], between)
    assert_close(jnp.concatenate([first, second]), whole, 1e-5)
    assert_close(state, last, 1e-5)
    assert not np.allclose(run(model, xs[2:], start)[0], second, rtol=1e-3), "the state is not used"
    assert jax.tree.structure(between) == jax.tree.structure(start)


@pytest.mark.parametrize(
    "tokens", [(3,), (4, 6)]
)  # fewer and more than the 5 features of a head: both orders of the product
def test_self_attention_is_q_k_v(tokens):
    """Compare each head and step, with integers that are exact in float32. `Spikes` give the same, and no value is stored."""
    heads, dim = 2, 5
    xs = jax.random.bernoulli(jax.random.key(0), 0.4, (9, 3, *tokens, 3 * heads * dim)).astype(jnp.float32)
    attend = models.SelfAttention(heads, scale=0.25)

    def by_hand(xs):
        q, k, v = jnp.split(xs.reshape(9, 3, -1, 3 * heads * dim), 3, -1)
        head = lambda a, h: a[..., h * dim : (h + 1) * dim]
        outs = [head(q, h) @ head(k, h).swapaxes(-1, -2) @ head(v, h) for h in range(heads)]
        return 0.25 * jnp.concatenate(outs, -1).reshape(9, 3, *tokens, heads * dim)

    @partial(jax.jit, static_argnums=0)
    def run(f, xs):
        outs, vjp = jax.vjp(f, xs)
        return outs, *vjp(cases.cotangents(outs))

    want, got = run(by_hand, xs), run(attend, xs)
    np.testing.assert_array_equal(got[0], want[0])
    assert_close(got[1], want[1], 1e-6)
    on_spikes = lambda xs: attend(nn.Spikes.of(xs))
    assert_close(run(on_spikes, xs), got, 1e-6)
    kept = jax.eval_shape(lambda xs: jax.tree.leaves(jax.vjp(on_spikes, xs)[1]), xs)
    assert max(leaf.size * leaf.dtype.itemsize for leaf in kept) <= xs.size / 4  # 2 bytes for 9 steps


@pytest.mark.parametrize("packed", [False, True])
def test_token_attention_is_its_equation_in_float64(packed):
    """Spikes and gradients: a = LIF(sum of q over a head's features), y = a k. The spikes are equal, and not silent."""
    heads, dim, threshold = 3, 4, 1.5
    xs = jax.random.bernoulli(jax.random.key(0), 0.45, (9, 2, 2, 5, 2 * heads * dim)).astype(jnp.float32)
    attend = models.TokenAttention(heads, models.spikformer_lif(threshold=threshold))

    def by_hand(xs):
        q, k = (half.reshape(*half.shape[:-1], heads, dim) for half in jnp.split(xs, 2, -1))
        v, outs = 0.0, []
        for t in range(9):
            u = (v + q[t].sum(-1)) / 2
            soft = jax.nn.sigmoid(4 * (u - threshold))
            a = soft + jax.lax.stop_gradient((u >= threshold) - soft)
            v = u * (1 - jax.lax.stop_gradient(a))
            outs.append((a[..., None] * k[t]).reshape(2, 2, 5, heads * dim))
        return jnp.stack(outs)

    @partial(jax.jit, static_argnums=0)
    def run(f, xs, d_outs):
        outs, vjp = jax.vjp(f, xs)
        return outs, *vjp(d_outs)

    d_outs = jax.random.normal(jax.random.key(1), (9, 2, 2, 5, heads * dim))
    got = run(lambda xs: attend(nn.Spikes.of(xs) if packed else xs)[0], xs, d_outs)
    with jax.enable_x64(True):
        want = jax.tree.map(np.asarray, run(by_hand, *(jnp.asarray(a, jnp.float64) for a in (xs, d_outs))))
    np.testing.assert_array_equal(got[0], want[0])
    assert 0.05 < got[0].mean() < 0.25 and abs(want[1]).max() > 0
    assert_close(got[1], want[1].astype(np.float32), 1e-6)


def test_every_parameter_of_qkformer_gets_a_gradient_and_packed_spikes_give_the_same():
    xs = jax.random.normal(jax.random.key(0), (2, 3, 8, 8, 2))
    found = {}
    for memory in ("fast", "packed"):
        model = models.qkformer(2, 4, depth=3, width=16, heads=2, memory=memory, rngs=nnx.Rngs(0))
        model.train()
        for _, norm in nnx.iter_modules(model):
            if isinstance(norm, nn.BatchNorm):
                norm.scale[...] = jnp.full_like(norm.scale[...], 4.0)  # so that every layer fires
        grads = nnx.jit(nnx.grad(loss_of))(model, xs, jnp.arange(3))
        found[memory] = [*map(np.asarray, jax.tree.leaves(grads))]
    assert [g.shape for g in found["fast"] if not abs(g).max() > 0] == []
    assert_close(found["packed"], found["fast"], 1e-5)


def transposed(model, *, B):
    """Shapes of the transposed arrays whose size is a multiple of B, in a training step lowered for an H100."""
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    graphdef, state = nnx.split((model, optimizer))

    def train(state, xs, labels):
        model, optimizer = nnx.merge(graphdef, state)
        loss, grads = nnx.value_and_grad(loss_of)(model, xs, labels)
        optimizer.update(model, grads)
        return loss, nnx.state((model, optimizer))

    xs, labels = jax.ShapeDtypeStruct((2, B, 32, 32, 3), jnp.bfloat16), jax.ShapeDtypeStruct((B,), jnp.int32)
    with h100():
        text = jax.jit(train).trace(state, xs, labels).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__gpu$xla.gpu.triton") >= 2 and "convolution" in text
    shapes = re.findall(r"stablehlo\.transpose .*?: \(tensor<([\dx]+)x\w+>\)", text)
    assert len(shapes) == text.count("stablehlo.transpose"), "a transpose was not understood"
    return [shape for shape in shapes if np.prod([int(n) for n in shape.split("x")]) % B == 0]


@pytest.mark.parametrize("memory", ["packed", "lean"])
def test_a_training_step_transposes_no_sequence(memory, monkeypatch):
    """B = 11. The size of every sequence is a multiple of 11, and the size of no weight is."""
    monkeypatch.setitem(models.resnet.DEPTHS, 18, (1, 1, 0, 0))
    options = dict(policy="bfloat16", memory=memory, implementation="pallas")
    model = nnx.eval_shape(lambda: models.spiking_resnet(18, 3, 10, **options, rngs=nnx.Rngs(0)))
    assert transposed(model, B=11) == []


def test_a_transposed_sequence_would_be_seen():
    def channels_first(x):
        return jax.lax.sort(x.transpose(0, 3, 1, 2), dimension=0).transpose(0, 2, 3, 1)

    rngs = nnx.Rngs(0)
    spiking = nn.NormSpiking(nn.IF(implementation="pallas"), nn.BatchNorm(4, rngs=rngs))
    head = nn.Sequential(nn.mean_pool, nn.Linear(4, 2, rngs=rngs))
    model = nn.Sequential(
        nn.Conv(3, 4, (3, 3), use_bias=False, dtype="bfloat16", rngs=rngs), channels_first, spiking, head
    )
    assert transposed(model, B=11) != []


make_vgg = partial(models.spiking_vgg, 11, 2, 4, hidden=8)
make_vgg_13 = partial(models.spiking_vgg, 13, 2, 4)
make_membrane = partial(models.spiking_resnet, 18, 3, 10, connect="membrane")
make_spikformer = partial(models.spikformer, 2, 4, depth=1, width=16, heads=2, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda: make_vgg(memory="small", rngs=nnx.Rngs(0)),
            ValueError,
            "memory must be one of fast, packed, lean; got 'small'",
        ),
        (lambda: make_vgg(policy="half", rngs=nnx.Rngs(0)), ValueError, "policy must be one of .*; got 'half'"),
        (lambda: shape_of(make_vgg, 2, 1, 16, 16, 2), ValueError, r"max_pool: .*got \(2, 1, 1, 512\), window 2"),
        (
            lambda: shape_of(make_vgg, 2, 1, 32, 32, 3),
            ValueError,
            r"layer 0, Conv, takes 2 features.*\(2, 1, 32, 32, 3\)",
        ),
        (lambda: make_spikformer(patch=3), ValueError, "patch must be one of 1, 2, 4, 8, 16; got 3"),
        (lambda: make_spikformer(width=36), ValueError, "width must be a multiple of 8 and of heads = 2; got 36"),
        (lambda: make_spikformer(heads=3), ValueError, "width must be a multiple of 8 and of heads = 3; got 16"),
        (lambda: make_spikformer(memory=None), ValueError, "memory must be one of .*; got None"),
        (
            lambda: models.SelfAttention(4)(jnp.ones((2, 1, 5, 20))),
            ValueError,
            r"a multiple of 4 heads; got \(2, 1, 5, 20",
        ),
        (lambda: models.SelfAttention(4)(jnp.ones((2, 5, 24))), ValueError, r"xs must be \[T, B, \*tokens, 3 D\]"),
        (lambda: models.qkformer(3, 9, depth=2, rngs=nnx.Rngs(0)), ValueError, "depth must be at least 3.*got 2"),
        (lambda: models.qkformer(3, 9, width=36, rngs=nnx.Rngs(0)), ValueError, "a multiple of 8, .*heads = 8; got 36"),
        (
            lambda: models.TokenAttention(4, nn.IF())(jnp.ones((2, 1, 5, 20))),
            ValueError,
            r"xs must be \[T, B, \*tokens, 2 D\], D a multiple of 4 heads; got \(2, 1, 5, 20",
        ),
        (
            lambda: list(
                models.torch_variables(nnx.eval_shape(lambda: models.spiking_resnet(19, 3, 10, rngs=nnx.Rngs(0))))
            ),
            ValueError,
            "the hidden layer of a ResNet-19 has no name",
        ),
        (
            lambda: models.load_torch(nnx.eval_shape(lambda: make_membrane(rngs=nnx.Rngs(0))), {}),
            ValueError,
            "model must not have connect='membrane'",
        ),
        (
            lambda: models.spiking_resnet(18, 3, 10, drop_path=0.1, rngs=nnx.Rngs(0)),
            ValueError,
            "drop_path goes with connect='add'; got connect='sum'",
        ),
        (lambda: make_spikformer(drop_path=1), ValueError, r"drop_path must be in \[0, 1\); got 1"),
        (lambda: make_vgg_13(rngs=nnx.Rngs(0)), ValueError, "depth must be one of 11, 16; got 13"),
        (lambda: models.spiking_resnet(18, 3, 10, stem="x", rngs=nnx.Rngs(0)), ValueError, "stem must be one of .*'x'"),
        (
            lambda: models.spiking_resnet(18, 3, 10, connect="x", rngs=nnx.Rngs(0)),
            ValueError,
            "must be one of .*got 'x'",
        ),
        (lambda: models.sew_resnet(18, 3, 10, connect="sum", rngs=nnx.Rngs(0)), ValueError, "connect must be .*'sum'"),
        (
            lambda: models.spiking_resnet(18, 3, 10, connect="membrane", drop_path=0.1, rngs=nnx.Rngs(0)),
            ValueError,
            "drop_path goes with connect='add'; got connect='membrane'",
        ),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
