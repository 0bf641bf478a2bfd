"""Neurons as modules: each one makes its parameters, stores its choices and calls `snnfuse.unroll`.

All are called on a sequence: `outs, state = layer(xs)` or `layer(xs, state)`. `snnfuse/core/neurons.py` has the equations as code.
"""

import dataclasses
import difflib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from numbers import Real
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from snnfuse.core import neurons
from snnfuse.core.neuron import Neuron, PyTree, WithState
from snnfuse.nn.padded import join, split, until_end
from snnfuse.nn.spikes import differentiable, values
from snnfuse.nn.temporal import Temporal
from snnfuse.ops.api import unroll
from snnfuse.ops.check import check_choice


class Fixed(nnx.Variable):
    """An array of a neuron that is not trained, such as one time constant per neuron, drawn once."""


class Range(NamedTuple):
    """How a learned parameter keeps its range: value = forward(raw), where raw may be any number."""

    forward: Callable[[Array], Array]
    inverse: Callable[[Array], Array]
    holds: Callable[[np.ndarray], np.ndarray]
    text: str


RANGES = {
    "sigmoid": Range(
        jax.nn.sigmoid, lambda p: jnp.log(p) - jnp.log1p(-p), lambda p: (p > 0) & (p < 1), "above 0 and below 1"
    ),
    "softplus": Range(
        jax.nn.softplus,
        lambda p: p + jnp.log(-jnp.expm1(-p)),
        lambda p: (p > 0) & np.isfinite(p),
        "above 0 and finite",
    ),
    "raw": None,
}


class Spiking(Temporal):
    """Any neuron as a module: xs [T, *B, N] -> (outs [T, *B, N], state [*B, N]). `layer.decay` is the value of `decay`.

    Args:
      neuron: a neuron, or its type, which is then called with `choices`.
      params: a NamedTuple with the initial value of each parameter.
      learn: names of the parameters to train, () by default. An optimizer cannot move them out of their range: the array that
        is trained, the `nnx.Param` `layer.raw_decay`, has no bounds, and `decay = sigmoid(raw_decay)` is in (0, 1).
        Parameters whose names begin with decay get "sigmoid"; threshold, delta and tau get "softplus", which keeps them
        above 0; others get "raw", the value itself. A dictionary chooses: `learn={"decay": "raw"}` trains `layer.decay`
        itself, without bounds, as snnTorch's learn_beta does. A parameter that is not trained stays a Python number, which
        is compiled into the kernel, or becomes `Fixed` if it is an array.
      shape: of the learned parameters: () for one value in all (the default), (N,) for one per channel, [*B, N] for one
        per neuron.
      implementation: "pallas", "mosaic", "triton", "scan" or "interpret"; None (the default) chooses, see `snnfuse.unroll`.
      out_dtype: dtype of the outputs, or a `snnfuse.Packed`; None (the default) is the dtype of xs. Only outputs in a float
        dtype carry a gradient: a layer with others raises TypeError if something before it, or in it, is differentiated.
      choices: fields of the neuron, such as `reset` and `surrogate`.
    """

    def __init__(
        self,
        neuron: Neuron | type,
        params: Any,
        *,
        learn: str | Sequence[str] | Mapping[str, str] = (),
        shape: tuple[int, ...] = (),
        implementation: str | None = None,
        out_dtype: Any = None,
        **choices,
    ):
        self.neuron = _neuron(neuron, choices, type(self))
        _check_finite(self.neuron)
        self.params_type = type(params)
        self.implementation = implementation
        self.out_dtype = out_dtype
        learn = _check_learn(self.neuron, params, learn, shape)
        self.learned = tuple(learn.items())
        for name, value in params._asdict().items():
            if value is None:  # the subclass has a property of this name
                continue
            if not _all(value, lambda value: ~np.isnan(value)):
                raise ValueError(f"{name} must not be NaN; got {value}")
            if (how := learn.get(name)) is None:
                setattr(self, name, value if isinstance(value, Real) else Fixed(jnp.asarray(value)))
            elif (kept := RANGES[how]) is None:
                setattr(self, name, _learned(name, value, shape))
            else:
                if not _all(value, lambda value, kept=kept: kept.holds(np.asarray(value, np.float32))):
                    raise ValueError(
                        f"{name} must be {kept.text} to be learned by {how!r}; got {value}. "
                        f"learn={{{name!r}: 'raw'}} learns it without bounds"
                    )
                setattr(self, f"raw_{name}", _learned(name, kept.inverse(jnp.asarray(value, jnp.float32)), shape))

    def __getattr__(self, name):
        """The value of a parameter that is learned in its range, from its `raw_` array."""
        how = dict(vars(self).get("learned", ())).get(name)
        if how is None or RANGES[how] is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return RANGES[how].forward(getattr(self, f"raw_{name}")[...])

    def __setattr__(self, name, value):
        """A parameter that is learned in its range is set by its `raw_` array; another array of its name would hide it."""
        how = dict(vars(self).get("learned", ())).get(name)
        if how is not None and RANGES[how] is not None:
            raise AttributeError(
                f"{name} is {how}(raw_{name}): set raw_{name}[...], or learn={{{name!r}: 'raw'}} and set it"
            )
        super().__setattr__(name, value)

    # This runs the neuron; `parallel.over_time` replaces it. It is a partial because `nnx.tabulate` wraps every public function
    # of a class as if it were a method.
    unroll = staticmethod(partial(unroll))

    @property
    def params(self) -> PyTree:
        """The parameters as the neuron's step takes them."""
        values = (getattr(self, name) for name in self.params_type._fields)
        return self.params_type(*(v[...] if isinstance(v, nnx.Variable) else v for v in values))

    def init_state(self, xs: PyTree) -> PyTree:
        return self.neuron.init_state(jax.tree.leaves(values(split(xs)[0]))[0].shape[1:])

    def __call__(self, xs: PyTree, state: PyTree | None = None) -> tuple[PyTree, PyTree]:
        options = dict(implementation=self.implementation, out_dtype=self.out_dtype)
        xs, lengths = split(xs)
        params, state, xs = differentiable(self.out_dtype, (self.params, state, values(xs)))
        outs, state = until_end(self.unroll, lengths)(self.neuron, params, state, xs, **options)
        return join(outs, lengths), state

    def trace(self, xs: Array, state: PyTree | None = None) -> tuple[tuple[Array, PyTree], PyTree]:
        """Like a call, and also returns the state after every step: ((outs, states), state), `states` float32 [T, *B, N]."""
        states_dtype = jax.tree.map(lambda _: jnp.float32, jax.eval_shape(lambda: self.init_state(xs)))
        out_dtype = (self.out_dtype or xs.dtype, states_dtype)
        neuron = WithState(self.neuron)
        return self.unroll(neuron, self.params, state, xs, implementation=self.implementation, out_dtype=out_dtype)


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
        self.w = _learned("w", -jnp.log(jnp.asarray(tau, jnp.float32) - 1), shape)

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
        if not _all(delta, lambda delta: (delta > 0) & np.isfinite(delta)):
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


# The names of arguments in other libraries: our names.
_OURS = {
    "beta": "decay",
    "alpha": "decay_syn",
    "v_threshold": "threshold",
    "v_th": "threshold",
    "thresh": "threshold",
    "tau_m": "tau",
    "tau_mem": "tau",
    "v_reset": "reset=snnfuse.HardReset(v_reset)",
    "detach_reset": "reset=snnfuse.HardReset(detach=True)",
    "reset_mechanism": "reset",
    "spike_grad": "surrogate",
    "surrogate_function": "surrogate",
    "learn_beta": "learn='decay'",
    "learn_threshold": "learn='threshold'",
}


def _neuron(neuron, choices, module):
    fields = dataclasses.fields(neuron) if isinstance(neuron, type) and dataclasses.is_dataclass(neuron) else ()
    _known(choices, module, [f.name for f in fields])
    for name in ("reset", "surrogate"):
        check_choice(name, choices.get(name))
    return neuron(**choices) if isinstance(neuron, type) else neuron


def _known(choices, module, fields):
    """Raise a TypeError, with a suggestion, at the first choice that is no field of the neuron."""
    for name in choices:
        if name not in fields:
            own = [n for cls in (module, Spiking) for n in inspect.signature(cls.__init__).parameters]
            names = [
                n for n in dict.fromkeys([*own, *fields]) if n not in ("self", "neuron", "params", "choices", "options")
            ]
            close = _OURS.get(name, "")
            close = (close if close.split("=")[0] in names else "") or next(
                iter(difflib.get_close_matches(name, names, n=1)), None
            )
            hint = f" (did you mean {close}?)" if close else ""
            raise TypeError(f"{module.__name__} has no argument {name!r}{hint}; it has {', '.join(names)}")


def _check_finite(part):
    """Check v_rest and v_reset among the fields of a neuron and of its reset."""
    for field in dataclasses.fields(part) if dataclasses.is_dataclass(part) else ():
        value = getattr(part, field.name)
        if field.name in ("v_rest", "v_reset") and isinstance(value, Real) and not math.isfinite(value):
            raise ValueError(f"{type(part).__name__}: {field.name} must be finite; got {value}")
        if field.name == "reset":
            _check_finite(value)


def _check_learn(neuron, params, learn, shape) -> dict[str, str]:
    """{the name of each parameter to learn: its range}."""
    if not hasattr(params, "_fields"):
        raise TypeError(f"params must be a NamedTuple; got {params!r}")
    if not isinstance(learn, Mapping):
        learn = {name: _range(name) for name in ((learn,) if isinstance(learn, str) else learn)}
    names = tuple(name for name, value in params._asdict().items() if value is not None)
    if unknown := [name for name in learn if name not in names]:
        raise ValueError(f"learn must name parameters of {type(neuron).__name__}, {names}; got {unknown[0]!r}")
    if unknown := [name for name, how in learn.items() if how not in RANGES]:
        raise ValueError(f"learn[{unknown[0]!r}] must be one of {', '.join(RANGES)}; got {learn[unknown[0]]!r}")
    if shape != () and not learn:
        raise ValueError(f"shape is the shape of the learned parameters, but learn is empty; got shape {shape}")
    return dict(learn)


def _range(name):
    if name.startswith("decay"):
        return "sigmoid"
    return "softplus" if name.startswith(("threshold", "delta", "tau")) else "raw"


def _learned(name, value, shape):
    value = jnp.asarray(value, jnp.float32)
    if value.ndim and shape == ():
        shape = value.shape
    try:
        return nnx.Param(jnp.broadcast_to(value, shape))
    except ValueError as e:
        raise ValueError(f"{name} must broadcast to shape {shape}; got {value.shape}") from e


def _decay(tau, decay, suffix="", given=()):
    tau_name, decay_name = "tau" + suffix, "decay" + suffix
    if (tau is None) == (decay is None):
        if other := next(
            (f"no argument {name!r} (did you mean {_OURS[name]}?)" for name in given if name in _OURS), None
        ):
            raise TypeError(f"there is {other}; give either {tau_name} or {decay_name}")
        raise ValueError(f"give either {tau_name} or {decay_name}; got {tau_name}={tau}, {decay_name}={decay}")
    if decay is None:
        if not _all(tau, lambda tau: tau > 1):
            raise ValueError(f"{tau_name} must be above 1 step, for {decay_name} = 1 - 1 / tau; got {tau}")
        return 1 - 1 / tau
    if not _all(decay, lambda decay: (decay >= 0) & (decay <= 1)):
        raise ValueError(f"{decay_name} must be in [0, 1]; got {decay}")
    return decay


def _all(value, holds):
    return isinstance(value, jax.core.Tracer) or bool(
        np.all(holds(np.asarray(value)))
    )  # a tracer has no value to check
