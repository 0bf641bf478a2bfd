"""The neuron equations, each written once: the baseline, both fused kernels and every gradient trace these steps.

In all of them x is the input current, v the membrane potential, and u the membrane potential before the reset. A neuron
spikes where u >= threshold. Each parameter broadcasts against [*B, N]: a scalar, one value a channel, or one a neuron. A
Python number in `params` is compiled in as a constant; an array gets a gradient. Time constants are in steps.

The defaults of a neuron's parameters are those of its `Params`; `reset`, `surrogate` and the other choices are fields.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from snnfuse.core.reset import HardReset, Reset
from snnfuse.core.surrogate import ATan, Surrogate, spike

Param = Array | float


def _leak(v, decay, v_rest):
    return decay * v if v_rest == 0 else v_rest + decay * (v - v_rest)


def _drive(x, decay, decay_input):
    return (1 - decay) * x if decay_input else x


def _fire(neuron, u, threshold):
    s = spike(u - threshold, neuron.surrogate)
    return neuron.reset(u, s, threshold), s


class IFParams(NamedTuple):
    threshold: Param = 1.0


class IFState(NamedTuple):
    v: Array


@dataclass(frozen=True)
class IF:
    """Integrate-and-fire.

    u[t] = v[t-1] + x[t];   s[t] = u[t] >= threshold;   v[t] = reset(u[t], s[t])
    """

    reset: Reset = HardReset()
    surrogate: Surrogate = ATan()

    def init_state(self, shape):
        return IFState(jnp.zeros(shape, jnp.float32))

    def step(self, params: IFParams, state: IFState, x: Array):
        v, s = _fire(self, state.v + x, params.threshold)
        return IFState(v), s


class LIFParams(NamedTuple):
    decay: Param = 0.5
    threshold: Param = 1.0


class LIFState(NamedTuple):
    v: Array


@dataclass(frozen=True)
class LIF:
    """Leaky integrate-and-fire.

        u[t] = v_rest + decay (v[t-1] - v_rest) + gain x[t];   s[t] = u[t] >= threshold;   v[t] = reset(u[t], s[t])

    `decay`, in (0, 1), is the factor by which v shrinks in a step: 1 - 1 / tau for the Euler step, exp(-1 / tau) exactly.
    `gain` is 1 - decay with `decay_input` and 1 without. How to get the neurons of other codes:

    SpikingJelly LIFNode(tau): decay 1 - 1 / tau, decay_input, v_rest = v_reset (0 for a soft reset).
    Temporal fusion paper, v = decay v (1 - s) + rest s + x: HardReset(v_reset=rest / decay), decay 0.2, threshold 0.3,
    Rectangle(). Its v is our u, before the reset.

    Neftci, Mostafa and Zenke 2019, https://arxiv.org/abs/1901.09948.
    """

    reset: Reset = HardReset()
    decay_input: bool = False
    v_rest: float = 0.0
    surrogate: Surrogate = ATan()

    def init_state(self, shape):
        return LIFState(jnp.full(shape, self.v_rest, jnp.float32))

    def step(self, params: LIFParams, state: LIFState, x: Array):
        u = _leak(state.v, params.decay, self.v_rest) + _drive(x, params.decay, self.decay_input)
        v, s = _fire(self, u, params.threshold)
        return LIFState(v), s


class CubaLIFParams(NamedTuple):
    decay_syn: Param = 0.5
    decay: Param = 0.5
    threshold: Param = 1.0


class CubaLIFState(NamedTuple):
    i: Array
    v: Array


@dataclass(frozen=True)
class CubaLIF:
    """Current-based (synaptic) leaky integrate-and-fire: an exponential synapse before the LIF membrane.

        i[t] = decay_syn i[t-1] + x[t]
        u[t] = v_rest + decay (v[t-1] - v_rest) + gain i[t];   s[t] = u[t] >= threshold;   v[t] = reset(u[t], s[t])

    `gain` is 1 - decay with `decay_input` and 1 without. snnTorch calls it Synaptic(alpha=decay_syn, beta=decay).
    """

    reset: Reset = HardReset()
    decay_input: bool = False
    v_rest: float = 0.0
    surrogate: Surrogate = ATan()

    def init_state(self, shape):
        return CubaLIFState(jnp.zeros(shape, jnp.float32), jnp.full(shape, self.v_rest, jnp.float32))

    def step(self, params: CubaLIFParams, state: CubaLIFState, x: Array):
        i = params.decay_syn * state.i + x
        u = _leak(state.v, params.decay, self.v_rest) + _drive(i, params.decay, self.decay_input)
        v, s = _fire(self, u, params.threshold)
        return CubaLIFState(i, v), s


class AdaptiveLIFParams(NamedTuple):
    decay: Param = 0.9
    decay_adapt: Param = 0.95
    beta: Param = 0.2
    threshold: Param = 1.0


class AdaptiveLIFState(NamedTuple):
    v: Array
    a: Array


@dataclass(frozen=True)
class AdaptiveLIF:
    """Leaky integrate-and-fire whose threshold rises with its own spikes.

        A[t] = threshold + beta a[t-1];   u[t] = v_rest + decay (v[t-1] - v_rest) + gain x[t]
        s[t] = u[t] >= A[t];   v[t] = reset(u[t], s[t], A[t]);   a[t] = decay_adapt a[t-1] + s[t]

    Bellec et al. 2018, https://arxiv.org/abs/1803.09574.
    """

    reset: Reset = HardReset()
    decay_input: bool = False
    v_rest: float = 0.0
    surrogate: Surrogate = ATan()

    def init_state(self, shape):
        return AdaptiveLIFState(jnp.full(shape, self.v_rest, jnp.float32), jnp.zeros(shape, jnp.float32))

    def step(self, params: AdaptiveLIFParams, state: AdaptiveLIFState, x: Array):
        u = _leak(state.v, params.decay, self.v_rest) + _drive(x, params.decay, self.decay_input)
        v, s = _fire(self, u, params.threshold + params.beta * state.a)
        return AdaptiveLIFState(v, params.decay_adapt * state.a + s), s


class ExpIFParams(NamedTuple):
    decay: Param = 0.5
    theta: Param = 0.8
    delta: Param = 1.0
    threshold: Param = 1.0


class ExpIFState(NamedTuple):
    v: Array


@dataclass(frozen=True)
class ExpIF:
    """Exponential integrate-and-fire.

        u[t] = v_rest + decay (v[t-1] - v_rest) + (1 - decay) (delta exp((v[t-1] - theta) / delta) + x[t])
        s[t] = u[t] >= threshold;   v[t] = reset(u[t], s[t])

    `theta` is the rheobase threshold and `delta` > 0 the sharpness of the upswing. With decay = 1 - 1 / tau this is
    SpikingJelly's EIFNode. Fourcaud-Trocme et al. 2003, https://doi.org/10.1523/JNEUROSCI.23-37-11628.2003.
    """

    reset: Reset = HardReset(v_reset=-0.1)
    v_rest: float = 0.0
    surrogate: Surrogate = ATan()

    def init_state(self, shape):
        return ExpIFState(jnp.full(shape, self.v_rest, jnp.float32))

    def step(self, params: ExpIFParams, state: ExpIFState, x: Array):
        upswing = params.delta * jnp.exp((state.v - params.theta) / params.delta)
        u = _leak(state.v, params.decay, self.v_rest) + _drive(upswing + x, params.decay, True)
        v, s = _fire(self, u, params.threshold)
        return ExpIFState(v), s


class IzhikevichParams(NamedTuple):
    a: Param = 0.02
    b: Param = 0.2
    c: Param = -65.0
    d: Param = 8.0
    threshold: Param = 30.0


class IzhikevichState(NamedTuple):
    v: Array
    w: Array


@dataclass(frozen=True)
class Izhikevich:
    """Izhikevich's neuron. v and its parameters are in mV, the step `dt` in ms; the defaults are a regular spiking cell.

        u[t] = v[t-1] + dt (0.04 v[t-1]^2 + 5 v[t-1] + 140 - w[t-1] + x[t])
        r[t] = w[t-1] + dt a (b v[t-1] - w[t-1])
        s[t] = u[t] >= threshold;   v[t] = (1 - s[t]) u[t] + s[t] c;   w[t] = r[t] + d s[t]

    The surrogate is given (u - threshold) / scale. Izhikevich 2003, https://doi.org/10.1109/TNN.2003.820440.
    """

    dt: float = 0.5
    scale: float = 30.0
    detach_reset: bool = False
    surrogate: Surrogate = ATan()

    def init_state(self, shape):
        rest = IzhikevichParams()
        return IzhikevichState(jnp.full(shape, rest.c, jnp.float32), jnp.full(shape, rest.b * rest.c, jnp.float32))

    def step(self, params: IzhikevichParams, state: IzhikevichState, x: Array):
        v, w = state
        u = v + self.dt * (0.04 * v * v + 5.0 * v + 140.0 - w + x)
        r = w + self.dt * params.a * (params.b * v - w)
        s = spike((u - params.threshold) / self.scale, self.surrogate)
        return IzhikevichState(HardReset(params.c, self.detach_reset)(u, s, params.threshold), r + params.d * s), s


class LIParams(NamedTuple):
    decay: Param = 0.5


class LIState(NamedTuple):
    v: Array


@dataclass(frozen=True)
class LI:
    """Leaky integrator, the usual readout: it never spikes; its output is v.

    v[t] = v_rest + decay (v[t-1] - v_rest) + gain x[t];   out[t] = v[t]
    """

    decay_input: bool = False
    v_rest: float = 0.0

    def init_state(self, shape):
        return LIState(jnp.full(shape, self.v_rest, jnp.float32))

    def step(self, params: LIParams, state: LIState, x: Array):
        v = _leak(state.v, params.decay, self.v_rest) + _drive(x, params.decay, self.decay_input)
        return LIState(v), v
