"""The spike, its surrogate gradients, and a smooth relaxation for each of them.

A surrogate is any hashable callable u -> ds/du, where u = v - threshold. Each surrogate below also has a method
`relaxation`: a smooth step function whose exact derivative is the surrogate. With it, finite differences can check the
gradient of a whole network (see `Relaxed`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

Surrogate = Callable[[Array], Array]


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def spike(u: Array, surrogate: Surrogate) -> Array:
    """1 where u >= 0 and 0 elsewhere, in the dtype of u. Its gradient is surrogate(u) instead of zero.

    Neftci, Mostafa and Zenke 2019, https://arxiv.org/abs/1901.09948.
    """
    if isinstance(surrogate, type):
        raise TypeError(f"surrogate must be an instance or a function; got the class {surrogate.__name__}")
    if isinstance(surrogate, Relaxed):
        return surrogate.surrogate.relaxation(u)
    return (u >= 0).astype(u.dtype)


@spike.defjvp
def _spike_jvp(surrogate, primals, tangents):
    (u,), (du,) = primals, tangents
    return spike(u, surrogate), surrogate(u) * du


def above_zero(owner, *names: str) -> None:
    """Check that these fields of a dataclass are numbers above 0 and finite."""
    for name in names:
        value = getattr(owner, name)
        if not 0 < value < float("inf"):
            raise ValueError(f"{type(owner).__name__}: {name} must be above 0 and finite; got {value}")


@dataclass(frozen=True)
class Relaxed:
    """Replaces the spike by the relaxation of `surrogate`, so that value and gradient agree. Use it in tests, not to train."""

    surrogate: Surrogate

    def __call__(self, u):
        return self.surrogate(u)


@dataclass(frozen=True)
class ATan:
    """ds/du = (alpha / 2) / (1 + (pi alpha u / 2)^2). Fang et al. 2021, https://arxiv.org/abs/2007.05785."""

    alpha: float = 2.0

    def __post_init__(self):
        above_zero(self, "alpha")

    def __call__(self, u):
        z = (jnp.pi / 2 * self.alpha) * u
        return (self.alpha / 2) / (1 + z * z)

    def relaxation(self, u):
        return jnp.arctan((jnp.pi / 2 * self.alpha) * u) / jnp.pi + 0.5


@dataclass(frozen=True)
class Sigmoid:
    """ds/du = alpha sigma(alpha u) (1 - sigma(alpha u)), where sigma is the logistic function. The code never overflows."""

    alpha: float = 4.0

    def __post_init__(self):
        above_zero(self, "alpha")

    def __call__(self, u):
        e = jnp.exp(-self.alpha * jnp.abs(u))
        return self.alpha * e / ((1 + e) * (1 + e))

    def relaxation(self, u):
        return jax.nn.sigmoid(self.alpha * u)


@dataclass(frozen=True)
class FastSigmoid:
    """ds/du = 1 / (1 + alpha |u|)^2, known as SuperSpike. Zenke and Ganguli 2018, https://arxiv.org/abs/1705.11146."""

    alpha: float = 10.0

    def __post_init__(self):
        above_zero(self, "alpha")

    def __call__(self, u):
        z = 1 + self.alpha * jnp.abs(u)
        return 1 / (z * z)

    def relaxation(self, u):
        return 0.5 + u / (1 + self.alpha * jnp.abs(u))


@dataclass(frozen=True)
class Triangle:
    """ds/du = gamma max(0, 1 - |u| / width). Bellec et al. 2018, https://arxiv.org/abs/1803.09574 (gamma 0.3, width 1)."""

    gamma: float = 0.3
    width: float = 1.0

    def __post_init__(self):
        above_zero(self, "gamma", "width")

    def __call__(self, u):
        return self.gamma * jnp.maximum(1 - jnp.abs(u) / self.width, 0)

    def relaxation(self, u):
        z = jnp.clip(u / self.width, -1, 1)
        return 0.5 + self.gamma * self.width * (z - 0.5 * z * jnp.abs(z))


def PiecewiseQuadratic(alpha: float = 1.0) -> Triangle:
    """ds/du = max(0, alpha - alpha^2 |u|): the triangle of area 1 whose relaxation is piecewise quadratic."""
    if not 0 < alpha < float("inf"):
        raise ValueError(f"PiecewiseQuadratic: alpha must be above 0 and finite; got {alpha}")
    return Triangle(gamma=alpha, width=1 / alpha)


@dataclass(frozen=True)
class Rectangle:
    """ds/du = 1 / width where |u| < width / 2, else 0. Width 1 is the temporal fusion paper's, arXiv 2408.00280."""

    width: float = 1.0

    def __post_init__(self):
        above_zero(self, "width")

    def __call__(self, u):
        return (jnp.abs(u) < self.width / 2).astype(u.dtype) / self.width

    def relaxation(self, u):
        return jnp.clip(u / self.width + 0.5, 0, 1)


@dataclass(frozen=True)
class Gaussian:
    """ds/du = alpha / sqrt(pi) exp(-(alpha u)^2); the relaxation is (1 + erf(alpha u)) / 2. SpikingJelly calls it Erf."""

    alpha: float = 2.0

    def __post_init__(self):
        above_zero(self, "alpha")

    def __call__(self, u):
        z = self.alpha * u
        return (self.alpha / jnp.pi**0.5) * jnp.exp(-z * z)

    def relaxation(self, u):
        return 0.5 + 0.5 * jax.lax.erf(self.alpha * u)


@dataclass(frozen=True)
class MultiGaussian:
    """ds/du = gamma ((1 + height) N(u; 0, sigma) - height N(u; sigma, scale sigma) - height N(u; -sigma, scale sigma)).

    N(u; m, sd) is the density of the normal distribution. Yin, Corradi and Bohte 2021, https://arxiv.org/abs/2103.12593.
    """

    gamma: float = 0.5
    sigma: float = 0.5
    height: float = 0.15
    scale: float = 6.0

    def __post_init__(self):
        above_zero(self, "gamma", "sigma", "scale")

    def __call__(self, u):
        wide = self._normal(u - self.sigma, self.scale) + self._normal(u + self.sigma, self.scale)
        return self.gamma * ((1 + self.height) * self._normal(u, 1.0) - self.height * wide)

    def _normal(self, u, scale):
        z = u / (scale * self.sigma)
        return jnp.exp(-0.5 * z * z) / (scale * self.sigma * (2 * jnp.pi) ** 0.5)

    def relaxation(self, u):
        below = lambda u, scale: 0.5 * jax.lax.erf(u / (scale * self.sigma * 2**0.5))
        wide = below(u - self.sigma, self.scale) + below(u + self.sigma, self.scale)
        return 0.5 + self.gamma * ((1 + self.height) * below(u, 1.0) - self.height * wide)


@dataclass(frozen=True)
class LeakyReLU:
    """ds/du = slope where u >= 0, else leak."""

    leak: float = 0.1
    slope: float = 1.0

    def __call__(self, u):
        return jnp.where(u >= 0, jnp.full_like(u, self.slope), jnp.full_like(u, self.leak))

    def relaxation(self, u):
        return u * self(u)
