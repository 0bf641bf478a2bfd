"""Batch normalisation and neuron, forward and backward: three ways to divide the work. Seconds on a GPU; results/norm.jsonl

unfused     statistics; x normalised and stored; the neuron's kernels on that
fused       statistics; the kernels take scale and shift (`nn.NormSpiking`); what the statistics add to dx is a pass of its own
two passes  the same forward; backward the kernel runs twice, once for the sums over the batch alone, once for dx with
            their part in it: 10 bytes per element and step in 16 bits where "fused" moves 12, for twice the arithmetic

`gradient_error` is the largest anywhere, against "unfused": one membrane on the other side of an edge of the surrogate's
window, or of the threshold, is an error of its own size there. In 16 bits "unfused" rounds the current, and flips spikes.
`gradient_error_of_most` is that of all but one gradient in 10,000.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from measure import ON_GPU, copy_rate, device_ms, record

import snnfuse as sf
from snnfuse.core.compose import Affine, AffineParams
from snnfuse.core.neuron import Neuron
from snnfuse.ops import api, fused, pallas_triton

T, IMPLEMENTATION = (32, "pallas") if ON_GPU else (8, "interpret")
LIF, PARAMS = sf.LIF(surrogate=sf.Rectangle()), sf.LIFParams(0.2, 0.3)
EPSILON = 1e-5


def statistics(x):
    x = x.astype(jnp.float32)
    axes = tuple(range(x.ndim - 1))
    mean = x.mean(axes)
    return mean, lax.rsqrt(jnp.maximum((x * x).mean(axes) - mean * mean, 0) + EPSILON)


def unroll(neuron, params, x):
    return sf.unroll(neuron, params, None, x, implementation=IMPLEMENTATION)[0]


def unfused(x, gamma, beta):
    mean, rstd = statistics(x)
    u = ((x.astype(jnp.float32) - mean) * (gamma * rstd) + beta).astype(x.dtype)
    return unroll(LIF, PARAMS, lax.optimization_barrier(u))


def fused_(x, gamma, beta):
    mean, rstd = statistics(x)
    return unroll(Affine(LIF), AffineParams(PARAMS, (gamma * rstd,), beta - mean * gamma * rstd), (x,))


class CorrectedParams(NamedTuple):
    inner: Any
    scale: jax.Array
    shift: jax.Array
    slope: jax.Array
    offset: jax.Array


@dataclass(frozen=True)
class Corrected:
    """Affine of one input, whose gradient is scale du + slope x + offset."""

    inner: Neuron

    def init_state(self, shape):
        return self.inner.init_state(shape)

    def step(self, params, state, x):
        return self.inner.step(params.inner, state, _corrected(x, *params[1:]))


@jax.custom_vjp
def _corrected(x, scale, shift, slope, offset):
    return scale * x + shift


_corrected.defvjp(
    lambda x, scale, shift, slope, offset: (scale * x + shift, (x, scale, slope, offset)),
    lambda r, d: (r[1] * d + r[2] * r[0] + r[3], *(jnp.zeros_like(d),) * 4),
)


def kernels(neuron, params, x):
    problem, leaves, state, xs = api._check(neuron, params, None, (x,) if isinstance(neuron, Affine) else x, None)
    implementation = api.IMPLEMENTATIONS[IMPLEMENTATION]
    made = pallas_triton.interpreted.kernels if implementation is not pallas_triton else pallas_triton.kernels
    return made(problem, implementation.blocks(problem)), leaves


@jax.custom_vjp
def two_passes(x, gamma, beta):
    return fused_(x, gamma, beta)


def _two_forward(x, gamma, beta):
    mean, rstd = statistics(x)
    run, leaves = kernels(Affine(LIF), AffineParams(PARAMS, (gamma * rstd,), beta - mean * gamma * rstd), x)
    outs, _, checkpoints = fused._forward(run, leaves, (), (x,), save=True)
    return outs[0], (x, gamma, beta, mean, rstd, checkpoints)


def _two_backward(residuals, d_out):
    x, gamma, beta, mean, rstd, checkpoints = residuals
    scale = gamma * rstd

    def backward(neuron, params, wanted):
        run, leaves = kernels(neuron, params, x)
        call = lambda run, *groups: run.backward(*groups, wanted)
        return fused.on_lanes(call, run, leaves, (), checkpoints, (x,), (d_out,), (None,))

    first = AffineParams(PARAMS, (scale,), beta - mean * scale)
    (d_scale, d_shift), _, _ = backward(Affine(LIF), first, fused.Wanted((True, True), (), (False,)))
    n, axes = x.size // x.shape[-1], tuple(range(d_scale.ndim - 1))
    along, plain = d_scale.sum(axes), d_shift.sum(axes)
    d_gamma = rstd * (along - mean * plain)
    slope = -scale * rstd * d_gamma / n
    second = CorrectedParams(PARAMS, scale, beta - mean * scale, slope, -scale * plain / n - slope * mean)
    _, _, (d_x,) = backward(Corrected(LIF), second, fused.Wanted((False,) * 4, (), (True,)))
    return d_x, d_gamma, plain


two_passes.defvjp(_two_forward, _two_backward)


def main():
    rate = copy_rate()
    for M, C in ((1254400, 64), (313600, 64), (102400, 256)) if ON_GPU else ((40, 8),):
        for dtype in (jnp.bfloat16, jnp.float32):
            draw = lambda seed, M=M, C=C, dtype=dtype: jax.random.normal(jax.random.key(seed), (T, M // C, C)).astype(
                dtype
            )
            gamma, beta = jnp.linspace(0.5, 1, C), jnp.linspace(-0.1, 0.1, C)
            sets = [(draw(2 * i), gamma, beta, draw(2 * i + 1)) for i in range(3)]
            want = None
            for name, f in (("unfused", unfused), ("fused", fused_), ("two passes", two_passes)):

                def both(x, gamma, beta, d_out, f=f):
                    out, vjp = jax.vjp(f, x, gamma, beta)
                    return out, vjp(d_out)

                row = dict(case=name, T=T, M=M, C=C, dtype=jnp.dtype(dtype).name)
                try:
                    got = jax.jit(both)(*sets[0])
                    want = want or got
                    size = lambda a: jnp.abs(a.astype(jnp.float32)).max()
                    error = max(float(size(a - b) / size(b)) for a, b in zip(got[1], want[1], strict=True))
                    far = jnp.abs((got[1][0] - want[1][0]).astype(jnp.float32)).ravel()[: 2**24]
                    most = float(jnp.quantile(far, 0.9999) / size(want[1][0]))
                    ms, low, high = device_ms(both, sets)
                    moved = ms * 1e-3 * rate / (T * M)
                    row |= dict(status="ok", ms=ms, quartiles=(low, high), bytes_at_copy_rate=moved)
                    row |= dict(flips=int((got[0] != want[0]).sum()), gradient_error=error, gradient_error_of_most=most)
                except Exception as e:  # a failure is a row
                    row |= dict(status=repr(e)[:300])
                record("norm", **row)


if __name__ == "__main__":
    main()
