"""What benchmarks on JAX share: timing, memory, a training step, and the ResNets with and without neurons."""

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

from snnfuse import models, nn, parallel
from snnfuse.models import resnet as ours

f32, bf16 = jnp.float32, jnp.bfloat16


def time_ms(f, *args, **options):
    return runner.time_ms(lambda: f(*args), jax.block_until_ready, **options)


def times(f, program, sets) -> dict:
    """`ms`: device time of f(*args), as one of several calls in one program. `call_ms`: `program`, f compiled, from Python.

    The sets of arguments differ, so the compiler cannot share results, and no input is still in the cache.
    """
    ms, *quartiles = device_ms(f, sets)
    return dict(ms=ms, quartiles=quartiles, call_ms=time_ms(program, *sets[0])[0])


def device_ms(f, sets):
    run = jax.jit(lambda sets: [f(*args) for args in sets])
    return [t / len(sets) for t in time_ms(run, sets)]


def compiled(f, *args):
    """(the jitted f, compiled; a row with the seconds that this took and the memory that the program holds)"""
    start = time.perf_counter()
    program = f.lower(*args).compile()
    return program, dict(compile_s=time.perf_counter() - start, peak_mb=peak_mb(program))


def peak_mb(program):
    """The most memory that a compiled program holds on one device: arguments, results and temporary arrays."""
    sizes = program.memory_analysis()
    held = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return (held + sizes.temp_size_in_bytes) / 1e6


def copy_rate(nbytes=2**30):
    """Bytes read and written per second by x + 1."""
    x = jax.random.normal(jax.random.key(0), (nbytes // 4,), f32)
    return 2 * x.nbytes / (time_ms(jax.jit(lambda x: x + 1), x)[0] * 1e-3)


def forward_backward(f):
    """A jitted (args, cotangents) -> (outputs, gradients) of f."""

    @jax.jit
    def run(args, cotangents):
        out, vjp = jax.vjp(f, *args)
        return out, vjp(cotangents)

    return run


def training_step(model, read=nn.membrane_mean, *, mesh=None, specs=None, sums=None, norm=False, prepare=None):
    """(step, leaves) with a jitted step(leaves, xs, labels) -> (leaves, metrics): forward, backward and Adam.

    `read` makes logits of the outputs. `mesh` and `specs`: the devices, and how xs and labels lie on them; `sums`: the dtype
    in which gradients are summed. `norm` puts the norm of the gradient among the metrics, beside the loss. `prepare(xs,
    number of the step)` makes the model's input within the step.
    """
    model.train()
    adam = optax.adam(1e-3) if mesh is None else parallel.flatten_optimizer(optax.adam(1e-3))
    graphdef, state = nnx.split((model, nnx.Optimizer(model, adam, wrt=nnx.Param)))
    # a list costs less time in each call than nnx.State
    leaves, tree = jax.tree.flatten(state if mesh is None else parallel.shard(state, mesh))

    def update(state, batch):
        model, optimizer = nnx.merge(graphdef, state)
        xs, labels = batch
        xs = prepare(xs, optimizer.step[...]) if prepare else xs
        value, grads = nnx.value_and_grad(lambda model: cross_entropy(read(model(xs)[0]), labels))(model)
        grads = grads if mesh is None else parallel.mean_gradients(grads, dtype=sums)
        optimizer.update(model, grads)
        metrics = dict(loss=value) | (dict(grad_norm=optax.tree.norm(grads)) if norm else {})
        return nnx.state((model, optimizer)), metrics

    if mesh is not None:
        update = parallel.data_parallel(update, mesh, batch=specs)

    @partial(jax.jit, donate_argnums=0)
    def step(leaves, xs, labels):
        state, metrics = update(tree.unflatten(leaves), (xs, labels))
        return jax.tree.leaves(state), metrics

    return step, leaves


def time_step(step, leaves, data) -> dict:
    """Milliseconds of a training step on the batches of `data` in turn, and the losses of the first six steps."""
    turn = itertools.cycle(data)

    def call():
        nonlocal leaves
        leaves, metrics = step(leaves, *next(turn))
        return metrics["loss"]

    losses = [float(call()) for _ in range(6)]
    agree = lambda count: int(multihost_utils.broadcast_one_to_all(count))
    ms, *quartiles = runner.time_ms(call, jax.block_until_ready, seconds=0.07, agree=agree)
    return dict(ms=ms, quartiles=quartiles, losses=losses)


def batches(T, B, size, count=8):
    """Random spikes of rate 0.5 and labels."""
    for i in range(count):
        key, label = jax.random.split(jax.random.key(i))
        yield jax.random.bernoulli(key, 0.5, (T, B, size, size, 3)), jax.random.randint(label, (B,), 0, 10)


def resnet(kind, depth, dtype, memory=None):
    """`kind`: an implementation; "relu", our network with ReLU for neurons; "flax_relu", a ResNet of Flax's own layers."""
    if kind == "flax_relu":
        return flax_resnet(depth, dtype)
    implementation = None if kind == "relu" else kind
    options = dict(memory=memory or "packed", implementation=implementation, rngs=nnx.Rngs(0))
    model = models.spiking_resnet(depth, 3, 10, policy=dtype, **options)
    return _with_relu(model) if kind == "relu" else model


class NormReLU(nn.Temporal):
    """`nn.NormSpiking` with ReLU in place of the neuron."""

    def __init__(self, layer):
        self.norm, self.shortcut_norm = layer.norm, layer.shortcut_norm

    def __call__(self, xs, state=None, shortcut=None):
        scale, shift = self.norm.affine(xs)
        current = xs.astype(f32) * scale + shift
        if shortcut is not None:
            scale, shift = (1.0, 0.0) if self.shortcut_norm is None else self.shortcut_norm.affine(shortcut)
            current = current + shortcut.astype(f32) * scale + shift
        return jax.nn.relu(current).astype(xs.dtype), ()


def _with_relu(model):
    model.layers = nnx.List([layer for layer in model.layers if not isinstance(layer, nn.PackSpikes)])
    for _, module in list(nnx.iter_modules(model)):
        for name, child in list(vars(module).items()):
            if isinstance(child, nn.NormSpiking):
                setattr(module, name, NormReLU(child))
        if isinstance(module, nn.Sequential):
            module.layers = nnx.List([NormReLU(x) if isinstance(x, nn.NormSpiking) else x for x in module.layers])
    return model


class FlaxBlock(nnx.Module):
    def __init__(self, features, width, stride, dtype, rngs):
        options = dict(dtype=dtype, rngs=rngs)
        conv = lambda features, size, stride: nnx.Conv(
            features, width, (size, size), strides=stride, padding=size // 2, use_bias=False, **options
        )
        norm = lambda: nnx.BatchNorm(width, **options)
        layers = [conv(features, 3, stride), norm(), jax.nn.relu, conv(width, 3, 1), norm()]
        same = features == width and stride == 1
        self.main = nnx.Sequential(*layers)
        self.beside = None if same else nnx.Sequential(conv(features, 1, stride), norm())

    def __call__(self, x):
        return jax.nn.relu(self.main(x) + (self.beside(x) if self.beside else x))


def flax_resnet(depth, dtype):
    """A ResNet as a JAX user would write it, of depth 18 or 34; a `model(xs)` like ours, on [T, B, H, W, 3]."""
    if depth >= 50:
        raise NotImplementedError(f"flax_relu has depth 18 and 34; got {depth}")
    dtype, rngs = nn.PrecisionPolicy(dtype).dtype, nnx.Rngs(0)
    stem = nnx.Conv(3, 64, (7, 7), strides=2, padding=3, use_bias=False, dtype=dtype, rngs=rngs)
    pool = lambda x: nnx.max_pool(x, (3, 3), (2, 2), [(1, 1), (1, 1)])
    layers, features = [stem, nnx.BatchNorm(64, dtype=dtype, rngs=rngs), jax.nn.relu, pool], 64
    for stage, count in enumerate(ours.DEPTHS[depth]):
        for i in range(count):
            layers.append(FlaxBlock(features, ours.WIDTHS[stage], 2 if stage and not i else 1, dtype, rngs))
            features = ours.WIDTHS[stage]
    return OverTime(nnx.Sequential(*layers, lambda x: x.mean((1, 2), dtype=f32), nnx.Linear(features, 10, rngs=rngs)))


class OverTime(nnx.Module):
    def __init__(self, net):
        self.net = net

    def __call__(self, xs):
        return self.net(xs.reshape(-1, *xs.shape[2:])).reshape(*xs.shape[:2], -1), ()


# What benchmarks/peers.py asks of a library's side; benchmarks/with_torch.py has the same functions.

roll = lambda x, count: jnp.roll(x, count, 1)
to_numpy = lambda x: np.asarray(x.astype(f32))
cross_entropy = lambda logits, labels: optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
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
    """(step, state) with step(state, *batch) -> (state, loss): a step of Adam on loss_of(weights, *batch)[0]."""
    adam = optax.adam(1e-3)

    @jax.jit
    def step(state, *batch):
        weights, moments = state
        value, gradients = jax.value_and_grad(lambda weights: loss_of(weights, *batch)[0])(weights)
        updates, moments = adam.update(gradients, moments)
        return (optax.apply_updates(weights, updates), moments), value

    return step, (weights, adam.init(weights))


def measure(f, sets, no_graph="") -> dict:
    program = f.lower(*sets[0]).compile()
    return dict(peak_mb=peak_mb(program)) | times(f, program, sets)
