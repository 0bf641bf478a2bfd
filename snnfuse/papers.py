"""Neurons of recent papers. Each gets its fused kernels like any neuron.

    layer = nn.Spiking(papers.SEAdLIF(), papers.SEAdLIFParams(decay=0.95), learn=("a", "b"), shape=(256,))
    outs, state = layer(xs)                                                            # or sf.unroll(neuron, params, ...)

The words are those of `snnfuse.core.neurons`: x is the input current, v the membrane potential, u the potential before
the reset, s the spike, and every state starts at 0. `params` broadcast against [*B, N]; the choices are fields.
"""

from dataclasses import dataclass
from numbers import Real
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from snnfuse.core.neurons import Param, fire
from snnfuse.core.reset import HardReset, Reset, SoftReset
from snnfuse.core.surrogate import ATan, Surrogate, above_zero, spike


def _zeros(kind, shape):
    return kind(*(jnp.zeros(shape, jnp.float32) for _ in kind._fields))


def _between(z, low, high):
    return jnp.where(z < low, low, jnp.where(z > high, high, z))


def _check_levels(neuron):
    above_zero(neuron, "levels")
    if neuron.levels != int(neuron.levels):
        raise ValueError(f"{type(neuron).__name__}: levels must be a whole number; got {neuron.levels}")


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
        return _zeros(AdLIFState, shape)

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
        return _zeros(SEAdLIFState, shape)

    def step(self, params: SEAdLIFParams, state: SEAdLIFState, x: Array):
        u = params.decay * state.v + (1 - params.decay) * (x - state.w)
        v, s = fire(self, u, params.threshold)
        gain = (1 - params.decay_adapt) * self.scale
        return SEAdLIFState(v, params.decay_adapt * state.w + gain * (params.a * v + params.b * s)), s


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
        return _zeros(RFState, shape)

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
        return _zeros(BRFState, shape)

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
        return _zeros(TCLIFState, shape)

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
        return _zeros(GLIFState, shape)

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
        return _zeros(CLIFState, shape)

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
        return _zeros(KLIFState, shape)

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
        return _zeros(QuadraticIFState, shape)

    def step(self, params: QuadraticIFParams, state: QuadraticIFState, x: Array):
        v = state.v
        u = v + (1 - params.decay) * (x + params.a * v * (v - params.v_critical))
        v, s = fire(self, u, params.threshold)
        return QuadraticIFState(v), s


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
        return _zeros(ILIFState, shape)

    def step(self, params: ILIFParams, state: ILIFState, x: Array):
        u = params.decay * state.v + x
        z = _between(u / params.threshold, 0.0, float(self.levels))
        s = z + jax.lax.stop_gradient(jnp.floor(z + 0.5) - z)
        return ILIFState(u - s * params.threshold), s


class QCFSParams(NamedTuple):
    threshold: Param = 1.0


@dataclass(frozen=True)
class QCFS:
    """Quantised ReLU: the firing rate over `levels` steps of an integrate-and-fire neuron with soft reset and a constant input.

        s[t] = min(max(floor(levels x[t] / threshold + shift), 0), levels) / levels

    It has no state. The gradient of s for x is 1 / threshold where 0 <= x <= threshold, and 0 elsewhere. A network with these
    neurons trains at T = 1, and its weights are a start for one of `IF` neurons with `SoftReset` at T = levels.

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
        return _zeros(TernaryLIFState, shape)

    def step(self, params: TernaryLIFParams, state: TernaryLIFState, x: Array):
        u = params.decay * state.v + x
        up, down = (spike(z - params.threshold, self.surrogate) for z in (u, -u))
        return TernaryLIFState((1 - up - down) * u), up - down
