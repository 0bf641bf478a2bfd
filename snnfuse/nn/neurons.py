"""The neurons as modules: each one makes its parameters and hands its choices to `Spiking`.

All are called on a sequence: `outs, state = layer(xs)` or `layer(xs, state)`. `snnfuse/core/neurons.py` has the equations as code.
"""

import jax
import jax.numpy as jnp
import numpy as np

from snnfuse.core import neurons
from snnfuse.nn.spiking import NAMES_ELSEWHERE, Spiking, all_hold, learned


class IF(Spiking):
    """Integrate-and-fire: xs [T, *B, N] -> (spikes [T, *B, N], state with v [*B, N]).

        u[t] = v[t-1] + x[t];   s[t] = u[t] >= threshold;   v[t] = reset(u[t], s[t])

    Args:
      threshold: 1.0 by default; a number, or an array that broadcasts against [*B, N].
      reset: `snnfuse.HardReset()` by default, to v = 0; or `SoftReset()`, `NoReset()`.
      surrogate: the gradient of a spike, `snnfuse.ATan()` by default.
      learn=(), shape=(), implementation=None, out_dtype=None: see `Spiking`.

    Lapicque 1907; SpikingJelly's IFNode. The equation as code: `snnfuse.IF`.
    """

    def __init__(self, *, threshold=1.0, **options):
        super().__init__(neurons.IF, neurons.IFParams(threshold), **options)


class LIF(Spiking):
    """Leaky integrate-and-fire: xs [T, *B, N] -> (spikes [T, *B, N], state with v [*B, N]).

        u[t] = v_rest + decay (v[t-1] - v_rest) + gain x[t];   s[t] = u[t] >= threshold;   v[t] = reset(u[t], s[t])

    Args:
      tau: the time constant in steps, above 1; decay = 1 - 1 / tau (the Euler step, as in SpikingJelly).
      decay: the part of v that one step keeps, in [0, 1]; exp(-1 / tau) is the exact one. Give tau or decay, not both.
      threshold: 1.0 by default. Each of these is a number, or an array that broadcasts against [*B, N].
      decay_input: False by default, gain = 1; True: gain = 1 - decay.
      v_rest: 0.0 by default, v without any input; also v before the first step.
      reset: `snnfuse.HardReset()` by default, to v = 0; or `SoftReset()`, `NoReset()`.
      surrogate: the gradient of a spike, `snnfuse.ATan()` by default.
      learn=(), shape=(), implementation=None, out_dtype=None: see `Spiking`.

    Neftci, Mostafa and Zenke 2019, https://arxiv.org/abs/1901.09948. The equation as code: `snnfuse.LIF`.
    """

    def __init__(self, *, tau=None, decay=None, threshold=1.0, **options):
        super().__init__(neurons.LIF, neurons.LIFParams(_decay(tau, decay, given=options), threshold), **options)


class ParametricLIF(Spiking):
    """LIF that learns its time constant: xs [T, *B, N] -> (spikes [T, *B, N], state with v [*B, N]).

        u[t] = v_rest + decay (v[t-1] - v_rest) + gain x[t];   s[t] = u[t] >= threshold;   v[t] = reset(u[t], s[t])
        decay = 1 - sigmoid(w), always in (0, 1), so that 1 / tau = sigmoid(w)

    Args:
      tau: the initial time constant in steps, above 1; 2.0 by default.
      threshold: 1.0 by default; a number, or an array that broadcasts against [*B, N].
      learn: () by default; "threshold" trains it too. `w` is always trained.
      shape: of w and of the learned threshold; () by default, for one value in all.
      decay_input: True by default, gain = 1 - decay, as in SpikingJelly; False: gain = 1.
      v_rest: 0.0 by default, v without any input; also v before the first step.
      reset: `snnfuse.HardReset()` by default, to v = 0; or `SoftReset()`, `NoReset()`.
      surrogate: the gradient of a spike, `snnfuse.ATan()` by default.
      implementation=None, out_dtype=None: see `Spiking`.

    Fang et al. 2021, https://arxiv.org/abs/2007.05785. The equation as code: `snnfuse.LIF`.
    """

    def __init__(self, *, tau=2.0, threshold=1.0, learn=(), shape=(), decay_input=True, **options):
        _decay(tau, None)
        super().__init__(
            neurons.LIF,
            neurons.LIFParams(None, threshold),
            learn=learn,
            shape=shape if learn else (),
            decay_input=decay_input,
            **options,
        )
        self.w = learned("w", -jnp.log(jnp.asarray(tau, jnp.float32) - 1), shape)

    @property
    def decay(self):
        return jax.nn.sigmoid(-self.w[...])


class CubaLIF(Spiking):
    """Current-based LIF, an exponential synapse before the membrane: xs [T, *B, N] -> (spikes, state with i and v [*B, N]).

        i[t] = decay_syn i[t-1] + x[t]
        u[t] = v_rest + decay (v[t-1] - v_rest) + gain i[t];   s[t] = u[t] >= threshold;   v[t] = reset(u[t], s[t])

    Args:
      tau_syn, tau: time constants of synapse and membrane in steps, above 1; decay = 1 - 1 / tau for each.
      decay_syn, decay: the parts of i and v that one step keeps, in [0, 1]. Give tau or decay, not both, of each.
      threshold: 1.0 by default. Each of these is a number, or an array that broadcasts against [*B, N].
      decay_input: False by default, gain = 1; True: gain = 1 - decay.
      v_rest: 0.0 by default, v without any input; also v before the first step.
      reset: `snnfuse.HardReset()` by default, to v = 0; or `SoftReset()`, `NoReset()`.
      surrogate: the gradient of a spike, `snnfuse.ATan()` by default.
      learn=(), shape=(), implementation=None, out_dtype=None: see `Spiking`.

    snnTorch's Synaptic(alpha=decay_syn, beta=decay). Neftci, Mostafa and Zenke 2019, https://arxiv.org/abs/1901.09948. The
    equation as code: `snnfuse.CubaLIF`.
    """

    def __init__(self, *, tau_syn=None, decay_syn=None, tau=None, decay=None, threshold=1.0, **options):
        decays = _decay(tau_syn, decay_syn, "_syn"), _decay(tau, decay, given=options)
        super().__init__(neurons.CubaLIF, neurons.CubaLIFParams(*decays, threshold), **options)


class AdaptiveLIF(Spiking):
    """LIF whose threshold rises with its own spikes: xs [T, *B, N] -> (spikes [T, *B, N], state with v and a [*B, N]).

        A[t] = threshold + beta a[t-1];   u[t] = v_rest + decay (v[t-1] - v_rest) + gain x[t]
        s[t] = u[t] >= A[t];   v[t] = reset(u[t], s[t], A[t]);   a[t] = decay_adapt a[t-1] + s[t]

    Args:
      tau, tau_adapt: time constants of membrane and threshold in steps, above 1; decay = 1 - 1 / tau for each.
      decay, decay_adapt: the parts of v and a that one step keeps, in [0, 1]. Give tau or decay, not both, of each.
      beta: 0.2 by default, by how much a spike raises the threshold.
      threshold: 1.0 by default, at rest. Each of these is a number, or an array that broadcasts against [*B, N].
      decay_input: False by default, gain = 1; True: gain = 1 - decay.
      v_rest: 0.0 by default, v without any input; also v before the first step.
      reset: `snnfuse.HardReset()` by default, to v = 0; or `SoftReset()`, `NoReset()`.
      surrogate: the gradient of a spike, `snnfuse.ATan()` by default.
      learn=(), shape=(), implementation=None, out_dtype=None: see `Spiking`.

    Bellec et al. 2018, https://arxiv.org/abs/1803.09574. The equation as code: `snnfuse.AdaptiveLIF`.
    """

    def __init__(self, *, tau=None, decay=None, tau_adapt=None, decay_adapt=None, beta=0.2, threshold=1.0, **options):
        decays = _decay(tau, decay, given=options), _decay(tau_adapt, decay_adapt, "_adapt")
        super().__init__(neurons.AdaptiveLIF, neurons.AdaptiveLIFParams(*decays, beta, threshold), **options)


class ExpIF(Spiking):
    """Exponential integrate-and-fire: xs [T, *B, N] -> (spikes [T, *B, N], state with v [*B, N]).

        u[t] = v_rest + decay (v[t-1] - v_rest) + (1 - decay) (delta exp((v[t-1] - theta) / delta) + x[t])
        s[t] = u[t] >= threshold;   v[t] = reset(u[t], s[t])

    Args:
      tau: the time constant in steps, above 1; decay = 1 - 1 / tau.
      decay: the part of v that one step keeps, in [0, 1]. Give tau or decay, not both.
      theta: 0.8 by default, where the upswing starts (the rheobase threshold).
      delta: 1.0 by default, above 0; the smaller, the sharper the upswing.
      threshold: 1.0 by default. Each of these is a number, or an array that broadcasts against [*B, N].
      v_rest: 0.0 by default, v before the first step.
      reset: `snnfuse.HardReset(v_reset=-0.1)` by default; or `SoftReset()`, `NoReset()`.
      surrogate: the gradient of a spike, `snnfuse.ATan()` by default.
      learn=(), shape=(), implementation=None, out_dtype=None: see `Spiking`.

    SpikingJelly's EIFNode. Fourcaud-Trocme et al. 2003, https://doi.org/10.1523/JNEUROSCI.23-37-11628.2003. The equation as
    code: `snnfuse.ExpIF`.
    """

    def __init__(self, *, tau=None, decay=None, theta=0.8, delta=1.0, threshold=1.0, **options):
        if not all_hold(delta, lambda delta: (delta > 0) & np.isfinite(delta)):
            raise ValueError(f"delta must be above 0 and finite; got {delta}")
        super().__init__(
            neurons.ExpIF, neurons.ExpIFParams(_decay(tau, decay, given=options), theta, delta, threshold), **options
        )


class Izhikevich(Spiking):
    """Izhikevich's neuron, in mV and ms: xs [T, *B, N] -> (spikes [T, *B, N], state with v and w [*B, N]).

        u[t] = v[t-1] + dt (0.04 v[t-1]^2 + 5 v[t-1] + 140 - w[t-1] + x[t])
        r[t] = w[t-1] + dt a (b v[t-1] - w[t-1])
        s[t] = u[t] >= threshold;   v[t] = (1 - s[t]) u[t] + s[t] c;   w[t] = r[t] + d s[t]

    Args:
      a, b, c, d, threshold: 0.02, 0.2, -65.0, 8.0 and 30.0 by default, a regular spiking cell. Each is a number, or an array
        that broadcasts against [*B, N].
      dt: 0.5 by default, ms per step.
      scale: 30.0 by default; the surrogate takes (u - threshold) / scale.
      detach_reset: False by default; True keeps the spike out of the reset's gradient.
      surrogate: the gradient of a spike, `snnfuse.ATan()` by default.
      learn=(), shape=(), implementation=None, out_dtype=None: see `Spiking`.

    Izhikevich 2003, https://doi.org/10.1109/TNN.2003.820440. The equation as code: `snnfuse.Izhikevich`.
    """

    def __init__(self, *, a=0.02, b=0.2, c=-65.0, d=8.0, threshold=30.0, **options):
        super().__init__(neurons.Izhikevich, neurons.IzhikevichParams(a, b, c, d, threshold), **options)


class LI(Spiking):
    """Leaky integrator, the usual readout; it never spikes: xs [T, *B, N] -> (v [T, *B, N], state with v [*B, N]).

        v[t] = v_rest + decay (v[t-1] - v_rest) + gain x[t];   out[t] = v[t]

    Args:
      tau: the time constant in steps, above 1; decay = 1 - 1 / tau.
      decay: the part of v that one step keeps, in [0, 1]; exp(-1 / tau) is the exact one. Give tau or decay, not both.
      decay_input: False by default, gain = 1; True: gain = 1 - decay.
      v_rest: 0.0 by default, v without any input; also v before the first step.
      learn=(), shape=(), implementation=None, out_dtype=None: see `Spiking`.

    SpikingJelly's NonSpikingLIFNode. The equation as code: `snnfuse.LI`.
    """

    def __init__(self, *, tau=None, decay=None, **options):
        super().__init__(neurons.LI, neurons.LIParams(_decay(tau, decay, given=options)), **options)


def _decay(tau, decay, suffix="", given=()):
    tau_name, decay_name = "tau" + suffix, "decay" + suffix
    if (tau is None) == (decay is None):
        if other := next(
            (
                f"no argument {name!r} (did you mean {NAMES_ELSEWHERE[name]}?)"
                for name in given
                if name in NAMES_ELSEWHERE
            ),
            None,
        ):
            raise TypeError(f"there is {other}; give either {tau_name} or {decay_name}")
        raise ValueError(f"give either {tau_name} or {decay_name}; got {tau_name}={tau}, {decay_name}={decay}")
    if decay is None:
        if not all_hold(tau, lambda tau: tau > 1):
            raise ValueError(f"{tau_name} must be above 1 step, for {decay_name} = 1 - 1 / tau; got {tau}")
        return 1 - 1 / tau
    if not all_hold(decay, lambda decay: (decay >= 0) & (decay <= 1)):
        raise ValueError(f"{decay_name} must be in [0, 1]; got {decay}")
    return decay
