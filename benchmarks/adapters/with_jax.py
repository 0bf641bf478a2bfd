"""How a library on JAX is checked and timed: `ms` of several calls in one program, `call_ms` of a jitted function.

JAX's default precision of float32 products is TF32 on a GPU, which is what PyTorch is set to.
"""

import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from measure import fwd_bwd, peak_mb, time_ms

from adapters import cases

DEVICE = jax.devices()[0].device_kind
SETS = 2  # of inputs, in one program: what one leaves in a cache, the next has not


def versions(library):
    return dict(jax=jax.__version__)


def run(adapter, case, dtype, way, reference):
    """The measured part of a row."""
    return KINDS[case.kind](adapter, case, dtype, way, reference)


def lif_call(adapter, case, dtype, way):
    """(spikes of x, x, cotangent)"""
    x, cotangent = (jnp.asarray(a).astype(dtype) for a in cases.lif_tensors(case))
    return adapter.lif(way, dtype), x, cotangent


def lif(adapter, case, dtype, way, reference):
    f, x, cotangent = lif_call(adapter, case, dtype, way)
    out = jax.eval_shape(f, x)
    run, row, (spikes, (gradient,)) = compiled(fwd_bwd(f), (x,), cotangent.astype(out.dtype))
    row |= compare(case, dtype, spikes, gradient, reference)
    if "status" in row:
        return row
    sets = [((jnp.roll(x, i, -1),), jnp.roll(cotangent, -i, -1).astype(out.dtype)) for i in range(SETS)]
    return row | times(run, fwd_bwd(f), sets)


def linear(adapter, case, dtype, way, reference):
    x, weight, cotangent = map(jnp.asarray, cases.linear_tensors(case))
    spiking = adapter.lif(way, "float32")

    @jax.jit
    def step(x, weight, cotangent):
        spikes, vjp = jax.vjp(lambda weight: spiking(x @ weight), weight)
        return spikes, vjp(cotangent.astype(spikes.dtype))[0]

    run, row, (spikes, _) = compiled(step, x, weight, cotangent)
    row |= compare(case, dtype, spikes, None, reference)
    if "status" in row:
        return row
    return row | times(run, step, [(x, weight, cotangent), (jnp.roll(x, 1, -1), weight, cotangent)])


def shd(adapter, case, dtype, way, reference):
    xs, labels, *weights = map(jnp.asarray, cases.shd_tensors(case))
    hidden, readout = adapter.lif(way, "float32"), adapter.readout(way)
    adam = optax.adam(1e-3)
    loss = partial(shd_loss, hidden, readout)
    value, spikes = jax.jit(loss)(weights, xs, labels)
    row = compare(case, dtype, spikes, None, reference, value)
    if "status" in row:
        return row

    def step(state, xs, labels):
        weights, moments = state
        value, gradients = jax.value_and_grad(lambda weights: loss(weights, xs, labels)[0])(weights)
        updates, moments = adam.update(gradients, moments)
        return (optax.apply_updates(weights, updates), moments), value

    def steps(state, batches):
        for batch in batches:
            state, value = step(state, *batch)
        return state, value

    state = weights, adam.init(weights)
    run, measured, _ = compiled(jax.jit(step), state, xs, labels)
    ms = time_ms(jax.jit(steps), state, [(jnp.roll(xs, i, 1), labels) for i in range(SETS)])
    call_ms = time_ms(run, state, xs, labels)[0]
    ms, low, high = (t / SETS for t in ms)
    return row | measured | dict(ms=ms, quartiles=(low, high), call_ms=call_ms)


def shd_loss(hidden, readout, weights, xs, labels):
    """The loss, and the hidden layer's spikes."""
    spikes = hidden(xs @ weights[0])
    logits = readout(spikes @ weights[1]).mean(0)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), spikes


def resnet(adapter, case, dtype, way, reference):
    step, state, data, timed = adapter.resnet(way, dtype, *case.shape)
    run, row, _ = compiled(step, state, *data[0], keep=False)
    (ms, low, high), losses, _ = timed(run, state, data)
    return row | dict(ms=ms, quartiles=(low, high), call_ms=ms, loss=losses[0])


KINDS = dict(lif=lif, linear=linear, shd=shd, resnet=resnet)


def compiled(f, *args, keep=True):
    """(the compiled f, how long that and its first call took and what memory it holds, its result)"""
    start = time.perf_counter()
    run = f.lower(*args).compile()
    out = jax.block_until_ready(run(*args)) if keep else None
    first = time.perf_counter() - start
    return run, dict(first_call_s=first, peak_mb=peak_mb(run)), out


def times(run, f, sets):
    ms, low, high = (t / len(sets) for t in time_ms(jax.jit(lambda sets: [f(*args) for args in sets]), sets))
    return dict(ms=ms, quartiles=(low, high), call_ms=time_ms(run, *sets[0])[0])


def compare(case, dtype, spikes, gradient, reference, loss=None):
    gradient = None if gradient is None else np.asarray(gradient.astype(jnp.float32))
    return cases.compare(case, dtype, np.asarray(spikes != 0), gradient, reference, loss)


def reference(adapter, case, dtype, neuron):
    """What our scan gives on this device for the neuron of that name, to be compared with."""
    spiking, packed = (
        partial(adapter.unroll, adapter.NEURONS[neuron]),
        lambda spikes: np.packbits(np.asarray(spikes != 0)),
    )
    with jax.default_matmul_precision("highest"):
        if case.kind == "lif":
            x, cotangent = (jnp.asarray(a).astype(dtype) for a in cases.lif_tensors(case))
            spikes, (gradient,) = fwd_bwd(spiking)((x,), cotangent)
            gradient = np.asarray(gradient[:, :: cases.stride(case)].astype(jnp.float32))
            return dict(spikes=packed(spikes), gradient=gradient)
        if case.kind == "linear":
            x, weight, _ = map(jnp.asarray, cases.linear_tensors(case))
            return dict(spikes=packed(jax.jit(lambda x, weight: spiking(x @ weight))(x, weight)))
        xs, labels, *weights = map(jnp.asarray, cases.shd_tensors(case))
        loss, spikes = jax.jit(partial(shd_loss, spiking, adapter.readout("scan")))(weights, xs, labels)
        return dict(spikes=packed(spikes), loss=float(loss))
