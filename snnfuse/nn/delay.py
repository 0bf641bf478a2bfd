"""Delays that are learned: a spike arrives later, by a number of steps that the gradient moves.

A delay d between two steps is a sum over the steps around it, with weights g that add up to 1 (dilated convolution with learnable
spacings, DCLS). The width sigma of g shrinks during training; in evaluation mode each delay is the nearest whole step.

    "gaussian"   g_k(d) ~ exp(-(k - d)^2 / (2 sigma^2))
    "triangle"   g_k(d) ~ max(0, 1 + sigma - |k - d|)         sigma = 0 interpolates between the two steps around d

Hammouamri, Khalfaoui-Hassani and Masquelier 2023, https://arxiv.org/abs/2306.17670; Khalfaoui-Hassani, Pellegrini and
Masquelier 2023, https://arxiv.org/abs/2306.00817. They clip delays to their range; here it is the range of a sigmoid.
"""

from collections.abc import Callable
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from snnfuse.nn.padded import join, split
from snnfuse.nn.spikes import Spikes, values
from snnfuse.nn.spiking import Fixed
from snnfuse.nn.temporal import Temporal, last_steps, whole, whole_steps, with_past

_lecun_normal = nnx.initializers.lecun_normal()


def _check_sigma(sigma, interpolation):
    if (
        not isinstance(sigma, Real | np.number | jax.Array | np.ndarray)
        or jnp.ndim(sigma)
        or not (0 < sigma < float("inf") or (sigma == 0 and interpolation == "triangle"))
    ):
        raise ValueError(f"sigma must be above 0 and finite (or 0, for 'triangle'), one number; got {sigma!r}")


class _Delayed(Temporal):
    """The delays of a layer, whose state is its input of the last `max_delay` steps."""

    def __init__(self, shape, max_delay, sigma, interpolation, rngs):
        max_delay = whole_steps("max_delay", max_delay)
        if interpolation not in ("gaussian", "triangle"):
            raise ValueError(f"interpolation must be 'gaussian' or 'triangle'; got {interpolation!r}")
        sigma = max_delay / 2 if sigma is None else sigma
        _check_sigma(sigma, interpolation)
        self.max_delay, self.interpolation, self.deterministic = max_delay, interpolation, False
        self.sigma = Fixed(jnp.asarray(sigma, jnp.float32))
        start = jax.random.uniform(rngs.params(), shape, jnp.float32, 0.01, 0.99)
        self.raw_delay = nnx.Param(jnp.log(start) - jnp.log1p(-start))

    @property
    def delay(self) -> Array:
        """The delays in steps, between 0 and `max_delay`: max_delay sigmoid(raw_delay)."""
        return self.max_delay * jax.nn.sigmoid(self.raw_delay[...])

    @property
    def taps(self) -> Array:
        """The weights g of the delays 0 to `max_delay`, [max_delay + 1, *shape of the delays]."""
        delay = self.delay
        k = jnp.arange(self.max_delay + 1, dtype=delay.dtype).reshape(-1, *(1,) * delay.ndim)
        if self.deterministic:
            return (k == jnp.round(delay)).astype(delay.dtype)
        sigma = self.sigma[...].astype(delay.dtype)
        if self.interpolation == "gaussian":
            return jax.nn.softmax(-(((k - delay) / sigma) ** 2) / 2, axis=0)
        g = jnp.maximum(0, 1 + sigma - jnp.abs(k - delay))
        return g / g.sum(0)

    def init_state(self, xs: Array | Spikes) -> Array:
        xs = values(split(xs)[0])
        return jnp.zeros((self.max_delay, *xs.shape[1:]), xs.dtype)

    def _window(self, xs, state, features):
        """xs with the steps before it, [max_delay + T, *B, N]."""
        if xs.ndim < 2 or not xs.size or xs.shape[-1] != features or not jnp.issubdtype(xs.dtype, jnp.floating):
            raise ValueError(f"xs must be floats [T, *B, {features}] without an empty axis; got {xs.dtype}{xs.shape}")
        return with_past(xs, state, self.max_delay)


class Delay(_Delayed):
    """One learned delay for each channel (axonal): xs [T, *B, N] -> (outs [T, *B, N], state [max_delay, *B, N]).

        outs[t] = sum_k g_k(delay) xs[t - k],   k = 0 .. max_delay,   xs = 0 before the first step

    Args:
      features: N.
      max_delay: the longest delay in steps, at least 1. Delays start uniform in 1 % to 99 % of it.
      sigma: the width of g, by default max_delay / 2; `sharpen` changes it. Not trained.
      interpolation: "gaussian" (the default) or "triangle"; the docstring of `snnfuse.nn.delay` has the equations.

    The Param is `raw_delay`; `delay` is its value in steps. `eval()` rounds delays to whole steps. Sums are float32.
    """

    def __init__(self, features: int, max_delay: int, *, sigma=None, interpolation="gaussian", rngs: nnx.Rngs):
        features = whole("features", features)
        super().__init__((features,), max_delay, sigma, interpolation, rngs)
        self.features = features

    def __call__(self, xs: Array | Spikes, state: Array | None = None) -> tuple[Array, Array]:
        xs, lengths = split(xs)
        xs = values(xs)
        window, taps, T = self._window(xs, state, self.features), self.taps, len(xs)
        wide = window.astype(jnp.promote_types(xs.dtype, jnp.float32))
        late = lambda k: wide[self.max_delay - k : self.max_delay - k + T]
        outs = sum(taps[k].astype(wide.dtype) * late(k) for k in range(self.max_delay + 1))
        return join(outs.astype(xs.dtype), lengths), last_steps(window, self.max_delay, lengths)


class DelayedLinear(_Delayed):
    """A linear layer with one learned delay for each synapse: xs [T, *B, I] -> (outs [T, *B, O], state [max_delay, *B, I]).

        outs[t, o] = bias[o] + sum_ik kernel[i, o] g_k(delay[i, o]) xs[t - k, i],   xs = 0 before the first step

    It is a convolution along time with a kernel of max_delay + 1 steps, so it takes that many times the products of `nn.Linear`.

    Args:
      in_features, out_features: I and O.
      max_delay, sigma, interpolation: as in `Delay`.
      use_bias: True by default.
      dtype: of the products and the output, that of xs by default. precision: that of `lax.Precision`.
      kernel_init: `lecun_normal` by default.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        max_delay: int,
        *,
        sigma: float | None = None,
        interpolation: str = "gaussian",
        use_bias: bool = True,
        dtype: Any = None,
        precision: Any = None,
        kernel_init: Callable = _lecun_normal,
        rngs: nnx.Rngs,
    ):
        in_features, out_features = whole("in_features", in_features), whole("out_features", out_features)
        super().__init__((in_features, out_features), max_delay, sigma, interpolation, rngs)
        self.in_features, self.out_features, self.dtype, self.precision = in_features, out_features, dtype, precision
        self.kernel = nnx.Param(kernel_init(rngs.params(), (in_features, out_features), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(out_features, jnp.float32)) if use_bias else None

    def __call__(self, xs: Array | Spikes, state: Array | None = None) -> tuple[Array, Array]:
        xs, lengths = split(xs)
        xs = values(xs)
        window = self._window(xs, state, self.in_features)
        dtype = self.dtype or xs.dtype
        kernel = (self.kernel[...] * self.taps)[::-1].astype(dtype)
        flat = window.reshape(len(window), -1, self.in_features).astype(dtype)  # [steps, B, I]
        layout = lax.ConvDimensionNumbers((1, 2, 0), (2, 1, 0), (1, 2, 0))  # where batch, features and steps are
        options = dict(dimension_numbers=layout, precision=self.precision)
        outs = lax.conv_general_dilated(flat, kernel, (1,), "VALID", **options)
        if self.bias is not None:
            outs = outs + self.bias[...].astype(dtype)
        outs = outs.reshape(*xs.shape[:-1], self.out_features)
        return join(outs, lengths), last_steps(window, self.max_delay, lengths)


def sharpen(model: nnx.Module, sigma: float | Array) -> None:
    """Set the width of all delays of a model, also inside a compiled step: a schedule makes them whole steps at the end.

    nn.sharpen(model, optax.exponential_decay(12.5, 1_000, 0.04, end_value=0.5)(optimizer.step[...]))
    """
    layers = [layer for _, layer in nnx.iter_modules(model) if isinstance(layer, _Delayed)]
    if not layers:
        raise ValueError(f"model must have a Delay or DelayedLinear; got {type(model).__name__} without one")
    if not isinstance(sigma, jax.core.Tracer):
        for layer in layers:
            _check_sigma(sigma, layer.interpolation)
    for layer in layers:
        layer.sigma[...] = jnp.asarray(sigma, jnp.float32)
