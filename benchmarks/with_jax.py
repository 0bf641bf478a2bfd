"""Timing, memory, a training step, and a ResNet with neurons or ReLU, for all benchmarks on JAX."""

import itertools
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import runner
from flax import nnx
from jax.experimental import multihost_utils

from snnfuse import models, nn, parallel, training
from snnfuse.parallel.step import ALONG_DATA

f32, bf16 = jnp.float32, jnp.bfloat16
ADAM = optax.adam(1e-3)
JOINED = parallel.flatten_optimizer(ADAM)  # its moments are a few arrays


def time_ms(f, *args, **options):
    return runner.time_ms(lambda: f(*args), jax.block_until_ready, **options)


def repeated(f, sets):
    """One compiled program that calls f on every set of arguments; an array may be a `jax.ShapeDtypeStruct`.

    The sets differ, so that the compiler cannot share results and no input is still in the cache.
    """
    return jax.jit(lambda sets: [f(*args) for args in sets]).lower(sets).compile()


def device_ms(program, sets, **options):
    """Milliseconds that the GPU takes for one set; `program` is `repeated(f, sets)`."""
    return [t / len(sets) for t in time_ms(program, sets, **options)]


def device_time(f, draw, count, **options):
    """A `measure` of a `runner.Case`: the device time of f(*draw(i)) over i = 0 .. count - 1."""
    program, drawn = repeated(f, [jax.eval_shape(draw, 0)] * count), jax.jit(draw).lower(0).compile()
    yield
    ms, *quartiles = device_ms(program, [drawn(i) for i in range(count)], **options)
    yield dict(ms=ms, quartiles=quartiles)


def compiled(f, *args):
    """(the jitted f, compiled; a row with the seconds that this took and the memory that the program holds)"""
    start = time.perf_counter()
    program = f.lower(*args).compile()
    return program, dict(compile_s=time.perf_counter() - start, peak_mb=peak_mb(program))


def largest_error(got, want):
    """The largest difference of an array of a tree, over the largest value of that array. No difference is 0, also of zeros."""

    def error(a, b):
        difference, largest = jnp.abs(a.astype(f32) - b.astype(f32)).max(), jnp.abs(b.astype(f32)).max()
        return jnp.where(difference == 0, 0, difference / largest)  # NaN stays NaN: it equals nothing

    return jnp.stack(jax.tree.leaves(jax.tree.map(error, got, want))).max()


def peak_mb(program):
    """The most memory that a compiled program holds on one device: arguments, results and temporary arrays."""
    sizes = program.memory_analysis()
    held = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return (held + sizes.temp_size_in_bytes) / 1e6


def forward_backward(f):
    """A jitted (args, cotangents) -> (outputs, gradients) of f."""

    @jax.jit
    def run(args, cotangents):
        out, vjp = jax.vjp(f, *args)
        return out, vjp(cotangents)

    return run


def step_of(read=nn.membrane_mean, *, meshed=False, sums=None, norm=False, prepare=None):
    """A training step as a function (model, optimizer, xs, labels) -> metrics.

    `read` makes logits of the outputs. `meshed`: gradients are averaged over devices, and `sums` is the dtype of these sums.
    `norm` adds the norm of the gradient to the metrics. `prepare(xs, number of the step)` makes the model's input within the step.
    """

    def step(model, optimizer, xs, labels):
        xs = prepare(xs, optimizer.step[...]) if prepare else xs
        loss, grads = nnx.value_and_grad(lambda model: cross_entropy(read(model(xs)[0]), labels))(model)
        grads = parallel.mean_gradients(grads, dtype=sums) if meshed else grads
        optimizer.update(model, grads)
        return dict(loss=loss) | (dict(grad_norm=optax.tree.norm(grads)) if norm else {})

    return step


def with_adam(model, adam=ADAM):
    """The model and its optimizer: one `adam` for all models, so that a step compiles once."""
    model.train()
    return model, nnx.Optimizer(model, adam, wrt=nnx.Param)


def training_step(model, read=nn.membrane_mean, *, mesh=None, specs=ALONG_DATA, **options):
    """`step_of` as a `compiled_step`, bound to its model and optimizer. `mesh` and `specs`: the devices, and how xs and labels
    lie on them."""
    step = training.compiled_step(step_of(read, meshed=mesh is not None, **options), mesh=mesh, batch=specs)
    return partial(step, *with_adam(model, JOINED if mesh else ADAM))


def time_step(step, data) -> dict:
    """Milliseconds of a training step on the batches of `data` in turn, its memory, its first metrics and its first losses."""
    *_, row = compile_then_time(step, data)
    return row


def compile_then_time(step, data):
    """`time_step` in the two halves of a `runner.Case`. Of K steps in a call it takes the mean of the metrics."""
    mean = lambda metrics: {name: float(values.mean()) for name, values in metrics.items()}
    lowers = isinstance(getattr(step, "func", None), training.CompiledStep)
    row = compiled(step.func, *step.args, *data[0])[1] if lowers else {}
    start = time.perf_counter()
    row = mean(step(*data[0])) | dict(compile_s=time.perf_counter() - start) | row
    yield
    turn = itertools.cycle([*data[1:], data[0]])
    call = lambda: step(*next(turn))
    losses = [row["loss"], *(mean(call())["loss"] for _ in range(5))]
    agree = lambda count: int(multihost_utils.broadcast_one_to_all(count))
    ms, *quartiles = runner.time_ms(call, jax.block_until_ready, seconds=0.07, agree=agree)
    yield row | dict(ms=ms, quartiles=quartiles, losses=losses)


def batch(seed, T, B, *shape):
    """Random spikes of rate 0.5, and labels."""
    key, label = jax.random.split(jax.random.key(seed))
    return jax.random.bernoulli(key, 0.5, (T, B, *shape)), jax.random.randint(label, (B,), 0, 10)


def batches(T, B, size, count=8):
    return [batch(i, T, B, size, size, 3) for i in range(count)]


def resnet(kind, depth, dtype, memory=None):
    """A spiking ResNet. `kind` is an implementation, or "relu" for the same network with ReLU in place of the neurons."""
    options = dict(memory=memory or "packed", implementation=None if kind == "relu" else kind, rngs=nnx.Rngs(0))
    model = models.spiking_resnet(depth, 3, 10, policy=dtype, **options)
    return with_relu(model) if kind == "relu" else model


class NormReLU(nn.Temporal):
    """`nn.NormSpiking` with ReLU in place of the neuron."""

    def __init__(self, layer):
        self.norm, self.shortcut_norm, self.connect = layer.norm, layer.shortcut_norm, layer.connect

    def __call__(self, xs, state=None, shortcut=None):
        scale, shift = self.norm.affine(xs)
        current = xs.astype(f32) * scale + shift
        if shortcut is not None and self.connect == "sum":
            scale, shift = (1.0, 0.0) if self.shortcut_norm is None else self.shortcut_norm.affine(shortcut)
            current = current + shortcut.astype(f32) * scale + shift
        outs = jax.nn.relu(current).astype(xs.dtype)
        return outs + shortcut if self.connect == "add" else outs, ()


def with_relu(model):
    """The model with ReLU in place of every neuron. It packs no spikes."""
    change = lambda x: NormReLU(x) if isinstance(x, nn.NormSpiking) else jax.nn.relu if isinstance(x, nn.Spiking) else x
    for _, module in list(nnx.iter_modules(model)):
        if isinstance(module, nn.NormSpiking):  # its neuron stays; nothing calls it any more
            continue
        for name, child in list(vars(module).items()):
            setattr(module, name, change(child))
        if isinstance(module, nn.Sequential):
            module.layers = nnx.List([change(x) for x in module.layers if not isinstance(x, nn.PackSpikes)])
    return model


# benchmarks/peers.py calls the functions below. benchmarks/with_torch.py has the same ones for PyTorch.

roll = lambda x, count: jnp.roll(x, count, 1)
to_numpy = lambda x: np.asarray(x.astype(f32))
cross_entropy = lambda logits, labels: optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
sync = jax.block_until_ready
run_once = lambda f, *args: jax.jit(f)(*args)  # without gradients


def array(x, dtype="float32"):
    return jnp.asarray(x) if x.dtype.kind == "i" else jnp.asarray(x).astype(dtype)


def pullback(f):
    """A function (weight, input, cotangent) -> (f(weight, input), the gradient for the weight)."""

    @jax.jit
    def run(weight, x, cotangent):
        out, vjp = jax.vjp(lambda weight: f(weight, x), weight)
        return out, vjp(cotangent.astype(out.dtype))[0]

    return run


def train(loss_of, weights):
    """(step, state): step(*state, *batch) returns the next state and the loss, by Adam on loss_of(weights, *batch)[0]."""

    @jax.jit
    def step(weights, moments, *batch):
        value, gradients = jax.value_and_grad(lambda weights: loss_of(weights, *batch)[0])(weights)
        updates, moments = ADAM.update(gradients, moments)
        return (optax.apply_updates(weights, updates), moments), value

    return step, (weights, ADAM.init(weights))


def measure(f, sets) -> dict:
    """`ms` is device time; `call_ms` is a call of the compiled f."""
    program = f.lower(*sets[0]).compile()
    ms, *quartiles = device_ms(repeated(f, sets), sets)
    return dict(peak_mb=peak_mb(program), ms=ms, quartiles=quartiles, call_ms=time_ms(program, *sets[0])[0])
