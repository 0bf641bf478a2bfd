"""Parallel spiking neurons: a weighted sum over time in place of a recursion, so that all steps are computed at once.

They have no reset. Fang et al. 2023, https://arxiv.org/abs/2304.12760; SpikingJelly's PSN, MaskedPSN and SlidingPSN.
"""

from math import sqrt
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from snnfuse.core.surrogate import ATan, spike
from snnfuse.nn.padded import join, split
from snnfuse.nn.spikes import Spikes, values
from snnfuse.nn.spiking import Fixed
from snnfuse.nn.temporal import Temporal, Timeless, last_steps, whole_steps, with_past
from snnfuse.ops.check import check_choice

_ATAN = ATan()


def _floats(xs):
    xs = values(xs)
    if xs.ndim < 2 or not xs.size or not jnp.issubdtype(xs.dtype, jnp.floating):
        raise ValueError(f"xs must be floats [T, *B, N] without an empty axis; got {xs.dtype}{xs.shape}")
    return xs


class PSN(Timeless):
    """The parallel spiking neuron: xs [T, *B, N] -> spikes [T, *B, N], for sequences of exactly T steps.

        h[t] = sum_s weight[t, s] xs[s];   s[t] = h[t] >= threshold[t]

    A step also sees the steps after it; `MaskedPSN` and `SlidingPSN` do not. All channels share `weight` [T, T] and `threshold` [T].

    Args:
      T: the number of steps.
      surrogate: the gradient of a spike, `snnfuse.ATan()` by default.
      precision: that of `lax.Precision`, for the product; on a GPU the default rounds it to ten bits of mantissa.

    `weight` starts uniform in +-1 / sqrt(T), `threshold` at 1; both are trained.
    """

    def __init__(self, T: int, *, surrogate: Any = _ATAN, precision: Any = None, rngs: nnx.Rngs):
        check_choice("surrogate", surrogate)
        self.T, self.surrogate, self.precision = whole_steps("T", T), surrogate, precision
        bound = 1 / sqrt(self.T)
        self.weight = nnx.Param(jax.random.uniform(rngs.params(), (self.T, self.T), jnp.float32, -bound, bound))
        self.threshold = nnx.Param(jnp.ones(self.T, jnp.float32))

    mixes_steps = True
    emits_spikes = True  # a monitor records its outputs

    def _weight(self):
        return self.weight[...]

    def __call__(self, xs: Array | Spikes) -> Array:
        xs = _floats(xs)
        if len(xs) != self.T:
            raise ValueError(f"xs must have T = {self.T} steps, one for each row of the weight; got {len(xs)}")
        weight = self._weight()
        wide = xs.astype(jnp.promote_types(xs.dtype, weight.dtype))
        h = jnp.einsum("ts,s...->t...", weight.astype(wide.dtype), wide, precision=self.precision)
        return spike(h - self.threshold[...].reshape(-1, *(1,) * (h.ndim - 1)).astype(h.dtype), self.surrogate).astype(
            xs.dtype
        )


class MaskedPSN(PSN):
    """A `PSN` that sees only the last `order` steps: xs [T, *B, N] -> spikes [T, *B, N], for sequences of exactly T steps.

        h[t] = sum_s weight[t, s] m[t, s] xs[s],   m[t, s] = 1 if t - order < s <= t, otherwise 1 - progress

    Args:
      T, surrogate, precision: as in `PSN`.
      order: the steps that h[t] sees, at least 1.
      progress: 1.0 by default. The paper starts at 0, which is a `PSN`, and raises it to 1 during training: `progress[...] = ...`.
    """

    def __init__(self, T: int, order: int, *, progress: float = 1.0, **options):
        super().__init__(T, **options)
        if not 0 <= progress <= 1:
            raise ValueError(f"progress must be in [0, 1]; got {progress}")
        self.order, self.progress = whole_steps("order", order), Fixed(jnp.asarray(progress, jnp.float32))

    def _weight(self):
        back = jnp.arange(self.T)[:, None] - jnp.arange(self.T)
        seen = (back >= 0) & (back < self.order)
        weight = self.weight[...]
        return jnp.where(seen, weight, (1 - self.progress[...]).astype(weight.dtype) * weight)


class SlidingPSN(Temporal):
    """One weight for each of the last `order` steps: xs [T, *B, N] -> (spikes [T, *B, N], state [order - 1, *B, N]).

        h[t] = sum_k weight[k] xs[t - k],   k = 0 .. order - 1,   xs = 0 before the first step;   s[t] = h[t] >= threshold

    It takes sequences of any length, also in pieces. All channels share `weight` [order] and `threshold`.

    Args:
      order: the steps that h[t] sees, at least 1.
      surrogate: the gradient of a spike, `snnfuse.ATan()` by default.

    `weight` starts at 1, 1/2, 1/4, ..., `threshold` at 1; both are trained. Sums are float32.
    """

    emits_spikes = True

    def __init__(self, order: int, *, surrogate: Any = _ATAN):
        check_choice("surrogate", surrogate)
        self.order, self.surrogate = whole_steps("order", order), surrogate
        self.weight = nnx.Param(0.5 ** jnp.arange(self.order, dtype=jnp.float32))
        self.threshold = nnx.Param(jnp.ones((), jnp.float32))

    def init_state(self, xs: Array | Spikes) -> Array:
        xs = values(split(xs)[0])
        return jnp.zeros((self.order - 1, *xs.shape[1:]), xs.dtype)

    def __call__(self, xs: Array | Spikes, state: Array | None = None) -> tuple[Array, Array]:
        xs, lengths = split(xs)
        xs = _floats(xs)
        window, T, weight = with_past(xs, state, self.order - 1), len(xs), self.weight[...]
        wide = window.astype(jnp.promote_types(xs.dtype, weight.dtype))
        late = lambda k: wide[self.order - 1 - k : self.order - 1 - k + T]
        h = sum(weight[k].astype(wide.dtype) * late(k) for k in range(self.order))
        outs = spike(h - self.threshold[...].astype(h.dtype), self.surrogate).astype(xs.dtype)
        return join(outs, lengths), last_steps(window, self.order - 1, lengths)
