"""Neurons with another equation of the membrane, such as two compartments, gates or a square."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from snnfuse.core.neurons import Param, fire
from snnfuse.core.reset import HardReset, Reset, SoftReset
from snnfuse.core.surrogate import ATan, Surrogate, spike
from snnfuse.papers.zeros import zeros


class TCLIFParams(NamedTuple):
    beta1: Param = -0.5
    beta2: Param = 0.5
    gamma: Param = 0.5
    threshold: Param = 1.0


class TCLIFState(NamedTuple):
    dendrite: Array
    v: Array


@dataclass(frozen=True)
class TCLIF:
    """Two compartments: a dendrite d, which gets the input, and a soma, which spikes.

        d[t] = e[t-1] + beta1 v[t-1] + x[t];   u[t] = v[t-1] + beta2 d[t];   s[t] = u[t] >= threshold
        e[t] = d[t] - gamma s[t];   v[t] = reset(u[t], s[t])

    Params and their defaults: beta1 = -0.5, beta2 = 0.5, gamma = 0.5, threshold = 1.0. The paper keeps beta1 in (-1, 0) and beta2 in
    (0, 1) by a sigmoid. As in the authors' code, the soma is reset before beta1 carries it to the dendrite.

    Args:
      reset: what a spike does to v: `HardReset`, `SoftReset` or `NoReset`.
      surrogate: the derivative of the spike that the backward pass uses, such as `ATan`.

    Zhang et al. 2024, https://arxiv.org/abs/2308.13250.
    """

    reset: Reset = SoftReset()
    surrogate: Surrogate = ATan()

    def init_state(self, shape):
        return zeros(TCLIFState, shape)

    def step(self, params: TCLIFParams, state: TCLIFState, x: Array):
        d = state.dendrite + params.beta1 * state.v + x
        u = state.v + params.beta2 * d
        v, s = fire(self, u, params.threshold)
        return TCLIFState(d - params.gamma * s, v), s


class GLIFParams(NamedTuple):
    alpha: Param = 0.6
    beta: Param = 0.8
    gamma: Param = 0.6
    decay: Param = 0.25
    leak: Param = 0.0625
    conductance: Param = 0.5
    v_drop: Param = 0.5
    threshold: Param = 0.5


class GLIFState(NamedTuple):
    v: Array


@dataclass(frozen=True)
class GLIF:
    """Gated LIF: gates mix two leaks, two ways to take the input, and two resets.

        u[t] = v[t-1] - (1 - alpha) leak + (1 - beta (1 - conductance)) x[t];   s[t] = u[t] >= threshold
        v[t] = (1 - alpha (1 - decay)) (1 - gamma s[t]) u[t] - (1 - gamma) v_drop s[t]

    Params and their defaults: alpha = 0.6, beta = 0.8, gamma = 0.6, decay = 0.25, leak = 0.0625, conductance = 0.5, v_drop = 0.5,
    threshold = 0.5. The gates alpha (leak), beta (input) and gamma (reset) are in (0, 1); at 1 the leak is exponential and the
    reset is to 0, at 0 the leak is linear and the reset subtracts `v_drop`. The paper's conductance differs between time
    steps: for that, multiply xs by it before, with beta = 0.

    Args:
      surrogate: the derivative of the spike that the backward pass uses, such as `ATan`.

    Yao et al. 2022, https://arxiv.org/abs/2210.13768.
    """

    surrogate: Surrogate = ATan()

    def init_state(self, shape):
        return zeros(GLIFState, shape)

    def step(self, params: GLIFParams, state: GLIFState, x: Array):
        p = params
        u = state.v - (1 - p.alpha) * p.leak + (1 - p.beta * (1 - p.conductance)) * x
        s = spike(u - p.threshold, self.surrogate)
        v = (1 - p.alpha * (1 - p.decay)) * (1 - p.gamma * s) * u - (1 - p.gamma) * p.v_drop * s
        return GLIFState(v), s


class CLIFParams(NamedTuple):
    decay: Param = 0.5
    threshold: Param = 1.0


class CLIFState(NamedTuple):
    v: Array
    m: Array


@dataclass(frozen=True)
class CLIF:
    """Complementary LIF: a second potential m counts spikes, and deepens the reset.

        u[t] = decay v[t-1] + x[t];   s[t] = u[t] >= threshold
        m[t] = sigma((1 - decay) u[t]) m[t-1] + s[t];   v[t] = u[t] - s[t] (threshold + sigma(m[t]))

    Params and their defaults: decay = 0.5, threshold = 1.0. sigma is the logistic function; 1 - decay is 1 / tau of the paper.

    Args:
      surrogate: the derivative of the spike that the backward pass uses, such as `ATan`.

    Huang et al. 2024, https://arxiv.org/abs/2402.04663.
    """

    surrogate: Surrogate = ATan()

    def init_state(self, shape):
        return zeros(CLIFState, shape)

    def step(self, params: CLIFParams, state: CLIFState, x: Array):
        u = params.decay * state.v + x
        s = spike(u - params.threshold, self.surrogate)
        m = jax.nn.sigmoid((1 - params.decay) * u) * state.m + s
        return CLIFState(u - s * (params.threshold + jax.nn.sigmoid(m)), m), s


class KLIFParams(NamedTuple):
    decay: Param = 0.5
    k: Param = 1.0
    threshold: Param = 1.0


class KLIFState(NamedTuple):
    v: Array


@dataclass(frozen=True)
class KLIF:
    """LIF whose membrane is scaled by a learned k and rectified before it spikes.

        f[t] = max(k (decay v[t-1] + (1 - decay) x[t]), 0);   s[t] = f[t] >= threshold;   v[t] = reset(f[t], s[t])

    Params and their defaults: decay = 0.5, k = 1.0, threshold = 1.0.

    Args:
      reset: what a spike does to v: `HardReset`, `SoftReset` or `NoReset`.
      surrogate: the derivative of the spike that the backward pass uses, such as `ATan`.

    Jiang and Zhang 2023, https://arxiv.org/abs/2302.09238; SpikingJelly's KLIFNode.
    """

    reset: Reset = HardReset()
    surrogate: Surrogate = ATan()

    def init_state(self, shape):
        return zeros(KLIFState, shape)

    def step(self, params: KLIFParams, state: KLIFState, x: Array):
        u = params.k * (params.decay * state.v + (1 - params.decay) * x)
        f = jnp.where(u > 0, u, 0.0)
        v, s = fire(self, f, params.threshold)
        return KLIFState(v), s


class QuadraticIFParams(NamedTuple):
    decay: Param = 0.5
    a: Param = 1.0
    v_critical: Param = 0.8
    threshold: Param = 1.0


class QuadraticIFState(NamedTuple):
    v: Array


@dataclass(frozen=True)
class QuadraticIF:
    """Quadratic integrate-and-fire: v decays below `v_critical`, and grows by itself above it.

        u[t] = v[t-1] + (1 - decay) (x[t] + a v[t-1] (v[t-1] - v_critical));   s[t] = u[t] >= threshold
        v[t] = reset(u[t], s[t])

    Params and their defaults: decay = 0.5, a = 1.0, v_critical = 0.8, threshold = 1.0. The resting potential is 0.

    Args:
      reset: what a spike does to v: `HardReset`, `SoftReset` or `NoReset`.
      surrogate: the derivative of the spike that the backward pass uses, such as `ATan`.

    Ermentrout and Kopell 1986, https://doi.org/10.1137/0146017; SpikingJelly's QIFNode with v_rest = 0.
    """

    reset: Reset = HardReset(v_reset=-0.1)
    surrogate: Surrogate = ATan()

    def init_state(self, shape):
        return zeros(QuadraticIFState, shape)

    def step(self, params: QuadraticIFParams, state: QuadraticIFState, x: Array):
        v = state.v
        u = v + (1 - params.decay) * (x + params.a * v * (v - params.v_critical))
        v, s = fire(self, u, params.threshold)
        return QuadraticIFState(v), s
