"""Neurons that resonate: their membrane oscillates."""

from dataclasses import dataclass
from numbers import Real
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from snnfuse.core.neurons import Param
from snnfuse.core.surrogate import ATan, Surrogate, above_zero, spike
from snnfuse.papers.zeros import zeros


class RFParams(NamedTuple):
    omega: Param = 10.0
    b: Param = -1.0
    threshold: Param = 1.0


class RFState(NamedTuple):
    v: Array
    y: Array


@dataclass(frozen=True)
class RF:
    """Resonate-and-fire: a damped oscillator that spikes where its real part v passes the threshold. It has no reset.

        v[t] = v[t-1] + dt (b v[t-1] - omega y[t-1] + x[t]);   y[t] = y[t-1] + dt (omega v[t-1] + b y[t-1])
        s[t] = v[t] >= threshold

    Params and their defaults: omega = 10.0, b = -1.0, threshold = 1.0. `omega` is the angular frequency, in radians a unit of
    time; b < 0 is the damping. An Euler step grows unless b < -omega^2 dt / 2, about.

    Args:
      dt: the length of a step.
      surrogate: the derivative of the spike that the backward pass uses, such as `ATan`.

    Izhikevich 2001, https://doi.org/10.1016/S0893-6080(01)00078-8, in the form of Higuchi et al. 2024.
    """

    dt: float = 0.01
    surrogate: Surrogate = ATan()

    def __post_init__(self):
        above_zero(self, "dt")

    def init_state(self, shape):
        return zeros(RFState, shape)

    def step(self, params: RFParams, state: RFState, x: Array):
        v, y = state
        u = v + self.dt * (params.b * v - params.omega * y + x)
        y = y + self.dt * (params.omega * v + params.b * y)
        return RFState(u, y), spike(u - params.threshold, self.surrogate)


class BRFParams(NamedTuple):
    omega: Param = 10.0
    b_offset: Param = 1.0
    threshold: Param = 1.0


class BRFState(NamedTuple):
    v: Array
    y: Array
    q: Array


@dataclass(frozen=True)
class BRF:
    """Balanced resonate-and-fire: `RF` that stays stable, and whose spikes raise the threshold and the damping for a while.

        b[t] = (-1 + sqrt(1 - (dt omega)^2)) / dt - b_offset - q[t-1]
        v[t] = v[t-1] + dt (b[t] v[t-1] - omega y[t-1] + x[t]);   y[t] = y[t-1] + dt (omega v[t-1] + b[t] y[t-1])
        s[t] = v[t] >= threshold + q[t-1];   q[t] = gamma q[t-1] + s[t]

    Params and their defaults: omega = 10.0, b_offset = 1.0, threshold = 1.0. dt omega must be below 1: a larger number raises
    ValueError, a larger value in an array gives NaN. The paper draws omega from [5, 10] and b_offset, above 0, from [0.1, 1]
    and wider ranges.

    Args:
      dt: the length of a step.
      gamma: the part of q that one step keeps.
      surrogate: the derivative of the spike that the backward pass uses, such as `ATan`.

    Higuchi et al. 2024, https://arxiv.org/abs/2402.14603.
    """

    dt: float = 0.01
    gamma: float = 0.9
    surrogate: Surrogate = ATan()

    def __post_init__(self):
        above_zero(self, "dt")

    def init_state(self, shape):
        return zeros(BRFState, shape)

    def step(self, params: BRFParams, state: BRFState, x: Array):
        v, y, q = state
        if isinstance(params.omega, Real) and not abs(self.dt * params.omega) < 1:
            raise ValueError(f"BRF: omega must be below 1 / dt = {1 / self.dt:g}; got {params.omega}")
        turn = self.dt * params.omega
        b = (jnp.sqrt(1 - turn * turn) - 1) / self.dt - params.b_offset - q
        u = v + self.dt * (b * v - params.omega * y + x)
        y = y + self.dt * (params.omega * v + b * y)
        s = spike(u - params.threshold - q, self.surrogate)
        return BRFState(u, y, self.gamma * q + s), s
