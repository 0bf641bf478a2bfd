"""What a spike does to the membrane: v = reset(u, s, threshold), where u is the membrane potential before the spike s.

With `detach` the reset treats the spike as a constant: dv/du then does not contain the surrogate gradient.
"""

from dataclasses import dataclass
from numbers import Real

from jax import Array, lax


@dataclass(frozen=True)
class HardReset:
    """v = (1 - s) u + s v_reset."""

    v_reset: float = 0.0
    detach: bool = False

    def __call__(self, u: Array, s: Array, threshold: Array | float) -> Array:
        s = lax.stop_gradient(s) if self.detach else s
        kept = (1 - s) * u
        if isinstance(self.v_reset, Real) and self.v_reset == 0:
            return kept  # a compiler cannot drop s * 0 by itself, because 0 * NaN is NaN
        return kept + s * self.v_reset


@dataclass(frozen=True)
class SoftReset:
    """v = u - s threshold."""

    detach: bool = False

    def __call__(self, u: Array, s: Array, threshold: Array | float) -> Array:
        s = lax.stop_gradient(s) if self.detach else s
        return u - s * threshold


@dataclass(frozen=True)
class NoReset:
    """v = u."""

    def __call__(self, u: Array, s: Array, threshold: Array | float) -> Array:
        return u


Reset = HardReset | SoftReset | NoReset
