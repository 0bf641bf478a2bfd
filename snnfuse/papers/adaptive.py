"""Neurons with an adaptation current."""

from dataclasses import dataclass
from typing import NamedTuple

from jax import Array

from snnfuse.core.neurons import Param, fire
from snnfuse.core.reset import HardReset, Reset
from snnfuse.core.surrogate import ATan, Surrogate
from snnfuse.papers.zeros import zeros


class AdLIFParams(NamedTuple):
    decay: Param = 0.935
    decay_adapt: Param = 0.993
    a: Param = 0.5
    b: Param = 1.0
    threshold: Param = 1.0


class AdLIFState(NamedTuple):
    v: Array
    w: Array
    s: Array


@dataclass(frozen=True)
class AdLIF:
    """LIF with an adaptation current w that follows the membrane and its spikes, by the forward Euler method.

        u[t] = decay v[t-1] + (1 - decay) (x[t] - w[t-1]);   s[t] = u[t] >= threshold;   v[t] = reset(u[t], s[t])
        w[t] = decay_adapt w[t-1] + (1 - decay_adapt) scale (a v[t-1] + b s[t-1])

    Params and their defaults: decay = 0.935, decay_adapt = 0.993, a = 0.5, b = 1.0, threshold = 1.0.

    Args:
      scale: of the adaptation; q in the paper of `SEAdLIF`, whose value is 120.
      reset: what a spike does to v: `HardReset`, `SoftReset` or `NoReset`.
      surrogate: the derivative of the spike that the backward pass uses, such as `ATan`.

    Bittar and Garner 2022, https://doi.org/10.3389/fnins.2022.865897; in the form of Baronig et al. 2024.
    """

    scale: float = 120.0
    reset: Reset = HardReset(detach=True)
    surrogate: Surrogate = ATan()

    def init_state(self, shape):
        return zeros(AdLIFState, shape)

    def step(self, params: AdLIFParams, state: AdLIFState, x: Array):
        u = params.decay * state.v + (1 - params.decay) * (x - state.w)
        v, s = fire(self, u, params.threshold)
        gain = (1 - params.decay_adapt) * self.scale
        w = params.decay_adapt * state.w + gain * (params.a * state.v + params.b * state.s)
        return AdLIFState(v, w, s), s


class SEAdLIFParams(NamedTuple):
    decay: Param = 0.935
    decay_adapt: Param = 0.993
    a: Param = 0.5
    b: Param = 1.0
    threshold: Param = 1.0


class SEAdLIFState(NamedTuple):
    v: Array
    w: Array


@dataclass(frozen=True)
class SEAdLIF:
    """`AdLIF` by the symplectic Euler method: w follows the new v and s, which keeps its oscillations stable.

        u[t] = decay v[t-1] + (1 - decay) (x[t] - w[t-1]);   s[t] = u[t] >= threshold;   v[t] = reset(u[t], s[t])
        w[t] = decay_adapt w[t-1] + (1 - decay_adapt) scale (a v[t] + b s[t])

    Params and their defaults: decay = 0.935, decay_adapt = 0.993, a = 0.5, b = 1.0, threshold = 1.0. The paper draws time
    constants of 5 to 25 steps (decay) and 60 to 300 (decay_adapt), a from [0, 1] and b from [0, 2].

    Args:
      scale: of the adaptation, q in the paper.
      reset: what a spike does to v: `HardReset`, `SoftReset` or `NoReset`.
      surrogate: the derivative of the spike that the backward pass uses, such as `ATan`.

    Baronig et al. 2024, https://arxiv.org/abs/2408.07517.
    """

    scale: float = 120.0
    reset: Reset = HardReset(detach=True)
    surrogate: Surrogate = ATan()

    def init_state(self, shape):
        return zeros(SEAdLIFState, shape)

    def step(self, params: SEAdLIFParams, state: SEAdLIFState, x: Array):
        u = params.decay * state.v + (1 - params.decay) * (x - state.w)
        v, s = fire(self, u, params.threshold)
        gain = (1 - params.decay_adapt) * self.scale
        return SEAdLIFState(v, params.decay_adapt * state.w + gain * (params.a * v + params.b * s)), s
