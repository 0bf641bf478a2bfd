"""A compiled step gives nnx.jit's bits, walks its objects once, and names every bad use."""

import gc
import re
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.nnx import graphlib
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from snnfuse import nn, parallel, training

T, B, N = 3, 8, 6


class Net(nnx.Module):
    """Everything that a training step changes: weights, batch statistics, a learned decay, and a random stream."""

    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(N, 12, rngs=rngs), nnx.BatchNorm(12, rngs=rngs), nn.LIF(tau=2.0)])
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.head = nnx.Linear(12, 3, rngs=rngs)
        self.constant = jnp.float32(1.5)

    def __call__(self, xs):
        linear, norm, lif = self.layers
        spikes, _ = lif(norm(linear(xs)))
        return self.head(self.dropout(spikes)).mean(0) * self.constant


def objects(seed=0, tx=optax.adam(1e-2)):  # noqa: B008  one optimizer: equal structures then compile once
    model = Net(nnx.Rngs(seed))
    metrics = nnx.MultiMetric(accuracy=nnx.metrics.Accuracy(), loss=nnx.metrics.Average("loss"))
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param), metrics, nnx.EMA(nnx.state(model, nnx.Param), decay=0.9)


def step(model, optimizer, metrics, ema, xs, labels):
    model.train()

    def loss_of(model):
        logits = model(xs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), logits

    (loss, logits), grads = nnx.value_and_grad(loss_of, has_aux=True)(model)
    optimizer.update(model, grads)
    metrics.update(logits=logits, labels=labels, loss=loss)
    ema.update(nnx.state(model, nnx.Param))
    return loss


def batches(n, batch=B):
    rng = np.random.default_rng(0)
    return rng.normal(size=(n, T, batch, N)).astype(np.float32), rng.integers(0, 3, (n, batch))


def bits(tree):
    """The raw numbers of every variable."""
    raw = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return [np.asarray(raw(x)) for x in jax.tree.leaves(nnx.state(tree))]


def assert_same(a, b):
    for x, y in zip(bits(a), bits(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.fixture
def compiles():
    """The number of programs that XLA has compiled, or of those with a name."""
    names = []
    listen = lambda event, *_, fun_name="", **__: event.endswith("backend_compile_duration") and names.append(fun_name)
    jax.monitoring.register_event_duration_secs_listener(listen)
    yield lambda name=None: names.count(name) if name else len(names)
    jax.monitoring.unregister_event_duration_listener(listen)


def test_steps_and_scanned_steps_give_the_bits_of_nnx_jit():
    xs, labels = batches(6)
    want, one, many = objects(), objects(), objects()
    reference, compiled = nnx.jit(step), training.compiled_step(step)
    losses = [reference(*want, x, y) for x, y in zip(xs, labels, strict=True)]
    assert [compiled(*one, x, y) for x, y in zip(xs, labels, strict=True)] == losses
    first = [compiled(*many, x, y) for x, y in zip(xs[:2], labels[:2], strict=True)]
    np.testing.assert_array_equal([*first, *compiled.scan(*many, xs[2:], labels[2:])], losses)
    assert_same(want, one)
    assert_same(want, many)
    assert want[2].compute() == one[2].compute() and 0 < one[2].compute()["accuracy"] < 1


def test_objects_are_walked_traced_and_compiled_once(monkeypatch, compiles):
    xs, labels = batches(4)
    traced = []
    compiled = training.compiled_step(lambda *args: traced.append(1) or step(*args))
    ours = objects()
    compiled(*ours, xs[0], labels[0])
    before = compiles()
    with monkeypatch.context() as m:
        for name in ("flatten", "unflatten", "iter_graph", "split", "merge"):
            m.setattr(graphlib, name, lambda *_, **__: pytest.fail("walked the objects"))
        m.setattr(graphlib.GraphDef, "__hash__", lambda *_: pytest.fail("hashed a graphdef"))
        m.setattr(jnp, "copy", lambda *_: pytest.fail("copied an array that nobody else holds"))
        for x, y in zip(xs[1:], labels[1:], strict=True):
            compiled(*ours, x, y)
    others = objects(seed=1)
    compiled(*others, xs[0], labels[0])  # the same structure
    on_device = jax.device_put((xs[0], labels[0]), jax.devices()[0])
    assert len(traced) == 1 and compiles() == before
    fresh = objects(seed=2)
    for _ in range(3):  # a committed batch commits the results, so that the arrays are committed beforehand
        compiled(*fresh, *on_device)
    assert len(traced) == 1 and compiles() <= before + 1


def test_objects_are_never_out_of_date():
    """Read, printed, evaluated, copied, written and saved between steps, like after nnx.jit."""
    xs, labels = batches(5)
    compiled, reference = training.compiled_step(step), nnx.jit(step)
    evaluate = training.compiled_step(lambda model, xs: model.eval() or model(xs))
    ours, want = objects(), objects()
    kept = nnx.clone(ours[0])  # other variables with the same arrays
    start = bits(kept)
    for i, (x, y) in enumerate(zip(xs, labels, strict=True)):
        compiled(*ours, x, y), reference(*want, x, y)
        np.testing.assert_array_equal(evaluate(ours[0], x), nnx.jit(lambda m, x: m.eval() or m(x))(want[0], x))
        assert str(nnx.state(ours[0])) == str(nnx.state(want[0])) and repr(ours[0])
        if i == 2:
            head = ours[0].head.kernel[...]
            nnx.update(ours[0], nnx.state(want[0]))
            want[0].head.bias[...] = ours[0].head.bias[...] = jnp.ones(3)
    assert_same(ours, want)
    for x, y in zip(start, bits(kept), strict=True):
        np.testing.assert_array_equal(x, y)
    assert np.isfinite(head).all()


def test_one_array_in_two_variables_is_not_donated_twice():
    model = Net(nnx.Rngs(0))
    model.head.bias.set_raw_value(shared := jnp.zeros(3))
    model.second = nnx.Param(shared)
    del shared

    @training.compiled_step
    def add(model, x):
        model.head.bias[...] += x

    add(model, 1.0), add(model, 1.0)
    np.testing.assert_array_equal(model.head.bias, [2, 2, 2])
    np.testing.assert_array_equal(model.second, [0, 0, 0])


def test_arrays_around_one_buffer_are_not_donated_twice():
    model = Net(nnx.Rngs(0))
    average = nnx.clone(model)  # with the same arrays, until `device_put` makes new ones around the same buffers
    for m in (model, average):
        nnx.update(m, jax.device_put(nnx.state(m), jax.devices()[0]))

    @training.compiled_step
    def move(model, average, x):
        model.head.bias[...] += x
        training.update_average(average, model, 0.5)

    move(model, average, 1.0), move.scan(model, average, jnp.ones(2))
    np.testing.assert_array_equal(model.head.bias, [3, 3, 3])
    np.testing.assert_array_equal(average.head.bias, [2.125, 2.125, 2.125])


def test_a_replaced_module_variable_or_switch_is_seen():
    xs, labels = batches(1)
    compiled, reference = training.compiled_step(predict), nnx.jit(predict)
    model = Net(nnx.Rngs(0))
    for change in (
        lambda: model.train(),
        lambda: model.eval(),
        lambda: setattr(model, "head", nnx.Linear(12, 3, use_bias=False, rngs=nnx.Rngs(5))),
        lambda: setattr(model.head, "kernel", nnx.Param(jnp.ones((12, 3)))),
        lambda: setattr(model, "constant", jnp.float32(2)),
        lambda: model.layers.append(nn.LIF(tau=3.0)) or model.layers.pop(2),
    ):
        compiled(model, xs[0])
        change()
        copy = nnx.clone(model)
        np.testing.assert_array_equal(compiled(model, xs[0]), reference(copy, xs[0]))


def predict(model, xs):
    return model(xs)


def test_gradients_accumulate_by_optax():
    xs, labels = batches(4)
    tx = optax.MultiSteps(optax.sgd(0.1), every_k_schedule=2)
    ours, want = objects(tx=tx), objects(tx=tx)
    compiled, reference = training.compiled_step(step), nnx.jit(step)
    for x, y in zip(xs, labels, strict=True):
        compiled(*ours, x, y), reference(*want, x, y)
    assert_same(ours, want)


def test_another_shape_compiles_once_and_says_so():
    xs, labels = batches(1)
    small, few = batches(1, batch=4)
    compiled, ours = training.compiled_step(step), objects()
    compiled(*ours, xs[0], labels[0])
    with (
        pytest.warns(UserWarning, match=re.escape("labels was int64[8] and is int64[4]; xs was float32[3, 8, 6]"))
        if (jax.config.jax_enable_x64)
        else pytest.warns(UserWarning, match=re.escape("step is compiled again: labels was"))
    ):
        compiled(*ours, small[0], few[0])
    compiled(*ours, xs[0], labels[0]), compiled(*ours, small[0], few[0])  # both known: a warning would be an error


@pytest.mark.parametrize("mesh", [None, "data=1"])
def test_lower_gives_the_program_of_the_calls_and_takes_no_step(mesh, compiles):
    """Also on a mesh of one device, whose arrays look like those of no mesh."""
    mesh = parallel.make_mesh(mesh) if mesh else None

    @training.compiled_step(mesh=mesh, batch=P("data"))
    def step(model, xs):
        model.kernel[...] += parallel.mean_gradients((xs.T @ xs).mean())
        return model.kernel.sum()

    model = nnx.Linear(3, 3, use_bias=False, rngs=nnx.Rngs(0))
    before, xs = jnp.copy(model.kernel[...]), jnp.ones((4, 3))
    program = step.lower(model, xs).compile()
    assert program.memory_analysis().argument_size_in_bytes >= 4 * (9 + 12)
    np.testing.assert_array_equal(model.kernel[...], before)
    count = compiles()
    for _ in range(2):  # JAX warns if the second compiles again
        step(model, xs)
    assert compiles() == count
    np.testing.assert_allclose(model.kernel[...], before + 8, rtol=1e-6)


@pytest.mark.parametrize("mesh", [None, "data=1"])
def test_a_step_compiles_before_its_model_has_weights(mesh, compiles):
    """Shapes with the shardings of the later arrays give the program of the calls, beside data that are there already."""
    mesh = parallel.make_mesh(mesh) if mesh else None
    sharding = NamedSharding(mesh, P()) if mesh else SingleDeviceSharding(jax.devices()[0])
    adam = optax.adam(1e-2)

    def make():
        model = nn.Sequential(nn.Linear(3, 4, rngs=nnx.Rngs(0)), nn.LIF(tau=2.0))
        return model, nnx.Optimizer(model, adam, wrt=nnx.Param)

    @training.compiled_step(mesh=mesh)
    def step(model, optimizer, data):
        (xs,), _ = data.next()
        grads = nnx.grad(lambda model: jnp.square(model(xs[None])[0] - 1).mean())(model)
        optimizer.update(model, parallel.mean_gradients(grads))

    shapes, data = nnx.eval_shape(make), training.DeviceData((np.ones((8, 3), np.float32),), 4)
    with pytest.raises(
        TypeError, match=r"model.layers\[0\].bias must hold an array in a call of step; got the shape of one"
    ):
        step(*shapes, data)
    for each in shapes:
        placed = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding, weak_type=x.weak_type)
        nnx.update(each, jax.tree.map(placed, nnx.state(each)))
    step.lower(*shapes, data).compile()
    ours = make()
    training.from_arrays(jax.device_put(training.to_arrays(*ours), sharding), *ours)
    before = jnp.copy(ours[0].layers[0].kernel[...])
    assert compiles("jit(step)") == 1 and data.position[...] == 0
    for _ in range(2):
        step(*ours, data)
    assert compiles("jit(step)") == 1 and data.position[...] == 2
    assert (ours[0].layers[0].kernel[...] != before).any()


@pytest.mark.parametrize("mesh", [None, "data=1"])
@pytest.mark.parametrize("check_finite", [False, True])
@pytest.mark.parametrize("abstract", ["all", "optimizer", "none"])
def test_the_program_that_was_lowered_is_that_of_the_calls(abstract, check_finite, mesh, compiles):
    """Also if only some objects hold shapes, with the flag of check_finite, and over a mesh by shapes that name no sharding."""
    adam = optax.adam(1e-2)

    def make():
        rngs = nnx.Rngs(0)
        model = nn.Sequential(nn.Linear(3, 4, rngs=rngs), nnx.Dropout(0.5, rngs=rngs), nn.LIF(tau=2.0))
        return model, nnx.Optimizer(model, adam, wrt=nnx.Param)

    mesh = parallel.make_mesh(mesh) if mesh else None

    @training.compiled_step(mesh=mesh, batch=P(None, "data"), check_finite=check_finite)
    def step(model, optimizer, xs):
        value, grads = nnx.value_and_grad(lambda model: jnp.square(model(xs)[0] - 1).mean())(model)
        optimizer.update(model, parallel.mean_gradients(grads))
        return value

    ours, shapes, xs = make(), nnx.eval_shape(make), jnp.ones((2, 4, 3))
    before = jnp.copy(ours[0].layers[0].kernel[...])
    given = dict(all=shapes, optimizer=(ours[0], shapes[1]), none=ours)[abstract]
    step.lower(*given, xs).compile()
    assert compiles("jit(step)") == 1
    np.testing.assert_array_equal(ours[0].layers[0].kernel[...], before)
    losses = [float(step(*ours, xs)) for _ in range(2)]
    assert compiles("jit(step)") == 1 and losses[0] != losses[1]


def test_what_a_model_was_called_with_is_let_go():
    gc.freeze()  # what was there before is not searched
    xs, labels = batches(1)
    compiled, ours = training.compiled_step(step), objects()
    compiled(*ours, xs[0], labels[0])
    gone = weakref.ref(ours[0]), weakref.ref(ours[0].head)
    del ours
    gc.collect()
    gc.unfreeze()
    assert gone[0]() is None and gone[1]() is None and not compiled.bindings


# ---- bad use


def _grow(model, x):
    model.extra = nnx.Param(x)


def _shrink(model, x):
    del model.head.bias


def _cast(model, x):
    model.head.kernel.set_raw_value(model.head.kernel[...].astype(jnp.bfloat16))


def _reshape(model, x):
    model.head.kernel.set_raw_value(model.head.kernel[...][:2])


def _kind(model, x):
    model.head.bias = nnx.BatchStat(model.head.bias[...])


def _count(model, x):
    model.calls = getattr(model, "calls", 0) + 1


def _array(model, x):
    model.constant = x


def _give(model, x):
    return model.head


BAD = {
    _grow: (ValueError, "_grow may not add a variable: it did add model.extra"),
    _shrink: (ValueError, "_shrink may not remove a variable: it did remove model.head.bias"),
    _cast: (TypeError, "dtype of model.head.kernel: it was float32[12, 3], and is bfloat16[12, 3]"),
    _reshape: (TypeError, "model.head.kernel: it was float32[12, 3], and is float32[2, 3]"),
    _kind: (ValueError, "the kind of model.head.bias: it was a Param, is a BatchStat"),
    _count: (ValueError, "_count changed model.calls from None to 1: only variables carry over"),
    _array: (ValueError, "_array changed model.constant, which is an array and no nnx.Variable"),
    _give: (TypeError, "it returned a Linear"),
}


@pytest.mark.parametrize("bad", BAD, ids=lambda f: f.__name__)
def test_a_step_that_changes_the_structure_is_an_error_that_names_it(bad):
    kind, message = BAD[bad]
    model = Net(nnx.Rngs(0))
    before = bits(model)
    with pytest.raises(kind, match=re.escape(message)):
        training.compiled_step(bad)(model, jnp.ones(3))
    for x, y in zip(before, bits(model), strict=True):
        np.testing.assert_array_equal(x, y)  # the model is as it was


def test_bad_calls_are_named():
    xs, labels = batches(2)
    compiled, ours = training.compiled_step(step), objects()
    with pytest.raises(TypeError, match="wants nnx objects first"):
        compiled(xs[0], *ours)
    with pytest.raises(TypeError, match=r"takes nnx objects first, .* got a Linear"):
        training.compiled_step(lambda model, x, other: x)(ours[0], xs[0], {"a": ours[0].head})
    with pytest.raises(RuntimeError, match="called while JAX traces"):
        jax.jit(lambda x: compiled(*ours, x, labels[0]))(xs[0])
    with pytest.raises(ValueError, match="wants one number of steps.* got 1, 2"):
        compiled.scan(*ours, xs[:2], labels[:1])
    with pytest.raises(TypeError, match="model.wrong must hold one array; got a dict"):
        ours[0].wrong = nnx.Variable({"a": 1})
        compiled(*ours, xs[0], labels[0])


def test_a_model_whose_arrays_are_gone_is_named():
    xs, _ = batches(1)
    compiled, model = training.compiled_step(predict), Net(nnx.Rngs(0))
    compiled(model, xs[0])
    model.head.kernel[...].delete()
    with pytest.raises(RuntimeError, match="model.head.kernel lost its array: predict gives the arrays to the device"):
        compiled(model, xs[0])
    model.head.kernel.set_raw_value(jnp.ones((12, 3)))
    compiled(model, xs[0])


@pytest.mark.parametrize("scanned", [False, True], ids=["calls", "scan"])
def test_a_nan_is_found_late_and_its_step_is_named(scanned):
    @training.compiled_step(check_finite=True)
    def scale(model, x):
        model.head.bias[...] *= x
        return {"loss": model.head.bias.sum(), "steps": 1, "norm": x}

    model = Net(nnx.Rngs(0))
    values = np.ones(200, np.float32)
    values[70] = np.inf  # the bias is 0
    with pytest.raises(FloatingPointError, match=r"its result\['loss'\], its result\['norm'\] at step 71 of the"):
        if scanned:
            for part in values.reshape(10, 20):
                scale.scan(model, part)
        for x in () if scanned else values:
            scale(model, x)
        pytest.fail("no error in 200 steps")
    model.head.bias[...] = jnp.zeros(3)
    scale(model, np.float32(1))
    scale.check()
    scale(model, np.float32(np.nan))
    with pytest.raises(FloatingPointError, match="at step 2 of the 2"):
        scale.check()


# ---- data on the device


def test_device_data_gives_each_sample_once_an_epoch_and_batch_k_whatever_came_before():
    images, labels = np.arange(20, dtype=np.uint8).reshape(10, 2), np.arange(10)
    data = training.DeviceData((images, labels), 3, seed=1)

    @training.compiled_step
    def take(data):
        (x, y), key = data.next()
        return x, y, jax.random.key_data(key)

    x, y, keys = take.scan(data, steps=2 * len(data))
    assert len(data) == 3 and x.dtype == jnp.uint8 and x.shape == (6, 3, 2)
    np.testing.assert_array_equal(x, images[y])
    first, second = np.ravel(y[:3]), np.ravel(y[3:])
    assert len(set(first.tolist())) == len(set(second.tolist())) == 9 and first.tolist() != second.tolist()
    assert len(np.unique(keys, axis=0)) == 6
    again = training.DeviceData((images, labels), 3, seed=1)
    again.position[...] = jnp.int32(4)
    for got, want in zip(take(again), (x[4], y[4], keys[4]), strict=True):
        np.testing.assert_array_equal(got, want)
    in_order = training.DeviceData((images, labels), 3, shuffle=False)
    np.testing.assert_array_equal(take.scan(in_order, steps=4)[1], [[0, 1, 2], [3, 4, 5], [6, 7, 8], [0, 1, 2]])
    with pytest.raises(ValueError, match="at least batch; got .10. samples, batch 11"):
        training.DeviceData((images, labels), 11)


def test_a_spiking_network_learns_from_data_on_the_device():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 96)
    images = (np.eye(3)[labels].repeat(2, 1) * 200 + rng.integers(0, 50, (96, 6))).astype(np.uint8)
    data = training.DeviceData((np.packbits(images > 100, axis=-1), labels), 32)
    model = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(2e-2), wrt=nnx.Param)

    @training.compiled_step
    def train_step(model, optimizer, data):
        (bits, labels), key = data.next()
        xs = jnp.unpackbits(bits, axis=-1)[:, :6].astype(jnp.float32) * jax.random.uniform(key, (T, 32, 1))

        def loss_of(model):
            return optax.softmax_cross_entropy_with_integer_labels(model(xs), labels).mean()

        loss, grads = nnx.value_and_grad(loss_of)(model)
        optimizer.update(model, grads)
        return loss

    losses = train_step.scan(model, optimizer, data, steps=30)
    assert losses[-3:].mean() < 0.5 * losses[0]


def test_a_restored_model_and_fresh_data_compile_once():
    """Results are committed to the device if any argument is: else the second call would compile again."""
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    restored = {name: jax.device_put(x, jax.devices()[0]) for name, x in training.to_arrays(model).items()}
    training.from_arrays(restored, model)
    data, traced = training.DeviceData((np.ones((4, 2), np.float32),), batch=2), []

    @training.compiled_step
    def step(model, data):
        traced.append(1)
        return model(data.next()[0][0]).sum()

    for _ in range(3):
        step(model, data)
    (program,) = step.programs.values()
    assert program.one._cache_size() == 1 and len(traced) == 1
