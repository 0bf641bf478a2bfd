"""The neuron equations, each written once: the baseline, both fused kernels and every gradient trace these steps.

In all of them x is the input current, v the membrane potential, u the membrane potential before the reset, and s the
spike. `params` holds the numbers that may be trained: each broadcasts against [*B, N], so it is a scalar, one value a
channel, or one a neuron. A Python number in `params` is compiled in as a constant; an array gets a gradient. The choices
that are never trained, such as the reset, are fields of the neuron. Time constants are in steps.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from snnfuse.core.reset import HardReset, Reset
from snnfuse.core.surrogate import ATan, Surrogate, above_zero, spike

Param = Array | float


def _leak(v, decay, v_rest):
    return decay * v if v_rest == 0 else v_rest + decay * (v - v_rest)


def _drive(x, decay, decay_input):
    return (1 - decay) * x if decay_input else x


def fire(neuron, u, threshold):
    """(v after the reset, the spike) of a neuron with fields `surrogate` and `reset`."""
    s = spike(u - threshold, neuron.surrogate)
    return neuron.reset(u, s, threshold), s


class IFParams(NamedTuple):
    threshold: Param = 1.0


class IFState(NamedTuple):
    v: Array


@dataclass(frozen=True)
class IF:
    """Integrate-and-fire: the input current x adds up in the membrane potential v, without a leak.

        u[t] = v[t-1] + x[t];   s[t] = u[t] >= threshold;   v[t] = reset(u[t], s[t])

    Params and their defaults: threshold = 1.0.

    Args:
      reset: what a spike does to v: `HardReset`, `SoftReset` or `NoReset`.
      surrogate: the derivative of the spike that the backward pass uses, such as `ATan`.

    Abbott 1999, on Lapicque 1907, https://doi.org/10.1016/S0361-9230(99)00161-6.
    """

    reset: Reset = HardReset()
    surrogate: Surrogate = ATan()

    def init_state(self, shape):
        return IFState(jnp.zeros(shape, jnp.float32))

    def step(self, params: IFParams, state: IFState, x: Array):
        v, s = fire(self, state.v + x, params.threshold)
        return IFState(v), s


class LIFParams(NamedTuple):
    decay: Param = 0.5
    threshold: Param = 1.0


class LIFState(NamedTuple):
    v: Array


@dataclass(frozen=True)
class LIF:
    """Leaky integrate-and-fire: the membrane potential v decays towards v_rest and adds up the input current x.

        u[t] = v_rest + decay (v[t-1] - v_rest) + gain x[t];   s[t] = u[t] >= threshold;   v[t] = reset(u[t], s[t])

    Params and their defaults: decay = 0.5, threshold = 1.0. `decay`, in (0, 1), is the factor by which v - v_rest shrinks
    in a step. For a time constant of tau steps it is exp(-1 / tau), or 1 - 1 / tau with the Euler method.

    Args:
      reset: what a spike does to v: `HardReset`, `SoftReset` or `NoReset`.
      decay_input: True: gain is 1 - decay. False: gain is 1.
      v_rest: the resting potential, and v before the first step.
      surrogate: the derivative of the spike that the backward pass uses, such as `ATan`.

    To match SpikingJelly's LIFNode(tau): decay = 1 - 1 / tau, decay_input=True, v_rest = its v_reset (0 for a soft reset).
    To match the temporal fusion paper, v = decay v (1 - s) + rest s + x: HardReset(v_reset=rest / decay), Rectangle(),
    decay = 0.2, threshold = 0.3. The v of that paper is our u.

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
        v, s = fire(self, u, params.threshold)
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

    Params and their defaults: decay_syn = 0.5, decay = 0.5, threshold = 1.0. Both decays are in (0, 1), as in `LIF`.

    Args:
      reset: what a spike does to v: `HardReset`, `SoftReset` or `NoReset`.
      decay_input: True: gain is 1 - decay. False: gain is 1.
      v_rest: the resting potential, and v before the first step. The synaptic current i starts at 0.
      surrogate: the derivative of the spike that the backward pass uses, such as `ATan`.

    snnTorch calls it Synaptic(alpha=decay_syn, beta=decay). Neftci, Mostafa and Zenke 2019,
    https://arxiv.org/abs/1901.09948.
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
        v, s = fire(self, u, params.threshold)
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
    """Leaky integrate-and-fire whose threshold A rises with each of its own spikes and decays back.

        A[t] = threshold + beta a[t-1];   u[t] = v_rest + decay (v[t-1] - v_rest) + gain x[t]
        s[t] = u[t] >= A[t];   v[t] = reset(u[t], s[t], A[t]);   a[t] = decay_adapt a[t-1] + s[t]

    Params and their defaults: decay = 0.9, decay_adapt = 0.95, beta = 0.2, threshold = 1.0. `a` is a decaying count of
    spikes, and `beta` is how much one spike raises the threshold. Both decays are in (0, 1), as in `LIF`.

    Args:
      reset: what a spike does to v: `HardReset`, `SoftReset` or `NoReset`.
      decay_input: True: gain is 1 - decay. False: gain is 1.
      v_rest: the resting potential, and v before the first step. a starts at 0.
      surrogate: the derivative of the spike that the backward pass uses, such as `ATan`.

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
        v, s = fire(self, u, params.threshold + params.beta * state.a)
        return AdaptiveLIFState(v, params.decay_adapt * state.a + s), s


MAX_EXPONENT = 80.0  # e^80 = 5.5e34: above it the upswing stays there, finite in float32, and its gradient is 0


class ExpIFParams(NamedTuple):
    decay: Param = 0.5
    theta: Param = 0.8
    delta: Param = 1.0
    threshold: Param = 1.0


class ExpIFState(NamedTuple):
    v: Array


@dataclass(frozen=True)
class ExpIF:
    """Exponential integrate-and-fire: LIF with an exponential upswing before the spike.

        u[t] = v_rest + decay (v[t-1] - v_rest) + (1 - decay) (delta exp((v[t-1] - theta) / delta) + x[t])
        s[t] = u[t] >= threshold;   v[t] = reset(u[t], s[t])

    Params and their defaults: decay = 0.5, theta = 0.8, delta = 1.0, threshold = 1.0. Above `theta`, the rheobase
    threshold, v grows by itself. A small `delta` > 0 makes the upswing sharp.

    Args:
      reset: what a spike does to v: `HardReset`, `SoftReset` or `NoReset`.
      v_rest: the resting potential, and v before the first step.
      surrogate: the derivative of the spike that the backward pass uses, such as `ATan`.

    With decay = 1 - 1 / tau this is SpikingJelly's EIFNode. Fourcaud-Trocme et al. 2003,
    https://doi.org/10.1523/JNEUROSCI.23-37-11628.2003.
    """

    reset: Reset = HardReset(v_reset=-0.1)
    v_rest: float = 0.0
    surrogate: Surrogate = ATan()

    def init_state(self, shape):
        return ExpIFState(jnp.full(shape, self.v_rest, jnp.float32))

    def step(self, params: ExpIFParams, state: ExpIFState, x: Array):
        exponent = (state.v - params.theta) / params.delta
        upswing = params.delta * jnp.exp(jnp.where(exponent > MAX_EXPONENT, MAX_EXPONENT, exponent))
        u = _leak(state.v, params.decay, self.v_rest) + _drive(upswing + x, params.decay, True)
        v, s = fire(self, u, params.threshold)
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
    """Izhikevich's neuron: a quadratic membrane v with a recovery variable w. v is in mV.

        u[t] = v[t-1] + dt (0.04 v[t-1]^2 + 5 v[t-1] + 140 - w[t-1] + x[t])
        r[t] = w[t-1] + dt a (b v[t-1] - w[t-1])
        s[t] = u[t] >= threshold;   v[t] = (1 - s[t]) u[t] + s[t] c;   w[t] = r[t] + d s[t]

    Params and their defaults (a regular spiking cell): a = 0.02, b = 0.2, c = -65.0, d = 8.0, threshold = 30.0.

    Args:
      dt: the length of a step in ms.
      scale: in mV; the surrogate gets (u - threshold) / scale, which has no unit.
      detach_reset: True: the reset treats the spike as a constant in the backward pass.
      surrogate: the derivative of the spike that the backward pass uses, such as `ATan`.

    Izhikevich 2003, https://doi.org/10.1109/TNN.2003.820440.
    """

    dt: float = 0.5
    scale: float = 30.0
    detach_reset: bool = False
    surrogate: Surrogate = ATan()

    def __post_init__(self):
        above_zero(self, "dt", "scale")

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
    """Leaky integrator, the usual readout of a network: it never spikes, and its output is v.

        v[t] = v_rest + decay (v[t-1] - v_rest) + gain x[t];   out[t] = v[t]

    Params and their defaults: decay = 0.5, as in `LIF`.

    Args:
      decay_input: True: gain is 1 - decay. False: gain is 1.
      v_rest: the resting potential, and v before the first step.

    Bellec et al. 2018, https://arxiv.org/abs/1803.09574.
    """

    decay_input: bool = False
    v_rest: float = 0.0

    def init_state(self, shape):
        return LIState(jnp.full(shape, self.v_rest, jnp.float32))

    def step(self, params: LIParams, state: LIState, x: Array):
        v = _leak(state.v, params.decay, self.v_rest) + _drive(x, params.decay, self.decay_input)
        return LIState(v), v
