"""Neurons with more outputs than 0 and 1."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from snnfuse.core.neurons import Param
from snnfuse.core.surrogate import ATan, Surrogate, above_zero, spike
from snnfuse.papers.zeros import zeros


def _between(z, low, high):
    return jnp.where(z < low, low, jnp.where(z > high, high, z))


def _check_levels(neuron):
    above_zero(neuron, "levels")
    if neuron.levels != int(neuron.levels):
        raise ValueError(f"{type(neuron).__name__}: levels must be a whole number; got {neuron.levels}")


class ILIFParams(NamedTuple):
    decay: Param = 0.25
    threshold: Param = 1.0


class ILIFState(NamedTuple):
    v: Array


@dataclass(frozen=True)
class ILIF:
    """Integer LIF: graded spikes of 0, 1, ... `levels`, which stand for that many binary spikes of the deployed network.

        u[t] = decay v[t-1] + x[t];   s[t] = min(max(floor(u[t] / threshold + 1/2), 0), levels);   v[t] = u[t] - s[t] threshold

    The gradient of s for u is 1 / threshold where 0 <= u <= levels threshold, and 0 elsewhere. `snnfuse.Packed(8, 0, levels)` stores
    these spikes in bits.

    Params and their defaults: decay = 0.25, threshold = 1.0.

    Args:
      levels: the largest spike, D in the paper; a whole number.

    Luo et al. 2024, https://arxiv.org/abs/2407.20708.
    """

    levels: int = 4

    def __post_init__(self):
        _check_levels(self)

    @property
    def spike_range(self) -> tuple[int, int]:
        return 0, int(self.levels)

    def init_state(self, shape):
        return zeros(ILIFState, shape)

    def step(self, params: ILIFParams, state: ILIFState, x: Array):
        u = params.decay * state.v + x
        z = _between(u / params.threshold, 0.0, float(self.levels))
        s = z + jax.lax.stop_gradient(jnp.floor(z + 0.5) - z)
        return ILIFState(u - s * params.threshold), s


@dataclass(frozen=True)
class BinaryILIF:
    """`ILIF` as it is deployed: each step gives `levels` binary spikes, a tuple, whose sum is the spike of `ILIF`.

        u_0 = decay v[t-1] + x[t];   s_d = u_d >= threshold / 2;   u_d+1 = u_d - s_d threshold,   d = 0 .. levels - 1;   v[t] = u_levels

    A linear layer without bias that adds up the products of the binary spikes gets what it gets from the graded ones. Params and state are
    those of `ILIF`. It is for inference: spikes have no gradient.

    Args:
      levels: as in `ILIF`.
    """

    levels: int = 4

    def __post_init__(self):
        _check_levels(self)

    def init_state(self, shape):
        return zeros(ILIFState, shape)

    def step(self, params: ILIFParams, state: ILIFState, x: Array):
        u, spikes = params.decay * state.v + x, []
        for _ in range(int(self.levels)):
            spikes.append(jnp.where(u >= params.threshold / 2, 1.0, jnp.zeros_like(u)))
            u = u - spikes[-1] * params.threshold
        return ILIFState(u), tuple(spikes)


class QCFSParams(NamedTuple):
    threshold: Param = 1.0


@dataclass(frozen=True)
class QCFS:
    """Quantised ReLU: the firing rate over `levels` steps of an integrate-and-fire neuron with soft reset and a constant input.

        s[t] = min(max(floor(levels x[t] / threshold + shift), 0), levels) / levels

    It has no state. The gradient of s for x is 1 / threshold where 0 <= x <= threshold, and 0 elsewhere. A network with these
    neurons trains at T = 1, and its weights are a start for one of `IF` neurons with `SoftReset` at T = levels. With shift = 1/2,
    levels s is the spike of `ILIF(levels)` with threshold / levels, from v = 0.

    Params and their defaults: threshold = 1.0.

    Args:
      levels: the number of steps whose rate it is, L in the paper; a whole number.
      shift: v before the first step, in thresholds; 0.5 in the paper, 0 for neurons that start at v = 0.

    Bu et al. 2022, https://arxiv.org/abs/2303.04347.
    """

    levels: int = 4
    shift: float = 0.5

    def __post_init__(self):
        _check_levels(self)

    def init_state(self, shape):
        return ()

    def step(self, params: QCFSParams, state: tuple, x: Array):
        z = _between(x / params.threshold, 0.0, 1.0)
        k = jnp.floor(self.levels * z + self.shift)
        s = jnp.where(k > self.levels, float(self.levels), k) / self.levels
        return (), z + jax.lax.stop_gradient(s - z)


class TernaryLIFParams(NamedTuple):
    decay: Param = 0.25
    threshold: Param = 1.0


class TernaryLIFState(NamedTuple):
    v: Array


@dataclass(frozen=True)
class TernaryLIF:
    """LIF with spikes of -1, 0 and 1. `snnfuse.Packed(8, -1, 1)` stores them in two bits each.

        u[t] = decay v[t-1] + x[t];   s[t] = (u[t] >= threshold) - (-u[t] >= threshold);   v[t] = (1 - |s[t]|) u[t]

    Params and their defaults: decay = 0.25, threshold = 1.0.

    Args:
      surrogate: the derivative of each of the two spikes that the backward pass uses, such as `ATan`.

    Guo et al. 2024, https://arxiv.org/abs/2312.06372.
    """

    surrogate: Surrogate = ATan()
    spike_range: ClassVar[tuple[int, int]] = (-1, 1)

    def init_state(self, shape):
        return zeros(TernaryLIFState, shape)

    def step(self, params: TernaryLIFParams, state: TernaryLIFState, x: Array):
        u = params.decay * state.v + x
        up, down = (spike(z - params.threshold, self.surrogate) for z in (u, -u))
        return TernaryLIFState((1 - up - down) * u), up - down
