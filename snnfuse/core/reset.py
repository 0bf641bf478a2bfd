"""What a spike does to the membrane: v = reset(u, s, threshold), u the membrane potential before the spike s.

`detach` keeps the spike out of the reset's gradient, so that dv/du does not see the surrogate.
"""

from dataclasses import dataclass

from jax import Array, lax


@dataclass(frozen=True)
class HardReset:
    """v = (1 - s) u + s v_reset."""

    v_reset: float = 0.0
    detach: bool = False

    def __call__(self, u: Array, s: Array, threshold: Array | float) -> Array:
        s = lax.stop_gradient(s) if self.detach else s
        return (1 - s) * u + s * self.v_reset


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
