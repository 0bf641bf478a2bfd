"""Neurons as modules: each makes its parameters, keeps its choices and calls `unroll`.

All of them are called on a sequence, `outs, state = layer(xs)` or `layer(xs, state)`, and take, besides their
parameters, the options of `Spiking`. Where a parameter is a decay, give it or its time constant in steps, not both:
decay = 1 - 1 / tau (the Euler step, as SpikingJelly; for the exact one give decay=exp(-1 / tau)).
"""

import dataclasses
from collections.abc import Sequence
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from snnfuse.core import neurons
from snnfuse.core.neuron import Neuron, PyTree, WithState
from snnfuse.nn.spikes import values
from snnfuse.nn.temporal import Temporal
from snnfuse.ops.api import unroll


class Fixed(nnx.Variable):
    """An array of a neuron that is not trained, such as one time constant a neuron, drawn once."""


class Spiking(Temporal):
    """Any neuron as a module. A parameter is the attribute of its name: `layer.decay`.

    Args:
      neuron: the neuron, or its type, made of `choices`.
      params: a NamedTuple of initial values.
      learn: the names of the parameters to train, each an `nnx.Param`. The others stay Python numbers, compiled in,
        or, where an array was given, `Fixed`.
      shape: of the learned parameters: () one for all, (N,) one a channel, [*B, N] one a neuron.
      implementation, out_dtype: see `snnfuse.unroll`.
      choices: the fields of the neuron: `reset`, `surrogate`, `decay_input`, ...
    """

    def __init__(
        self,
        neuron: Neuron | type,
        params: Any,
        *,
        learn: Sequence[str] = (),
        shape: tuple[int, ...] = (),
        implementation: str | None = None,
        out_dtype: Any = None,
        **choices,
    ):
        self.neuron = _neuron(neuron, choices)
        self.params_type = type(params)
        self.implementation = implementation
        self.out_dtype = out_dtype
        learn = _check_learn(self.neuron, params, learn, shape)
        for name, value in params._asdict().items():
            if value is not None:  # None: a property of the subclass
                setattr(self, name, _parameter(name, value, shape if name in learn else None))

    unroll = staticmethod(unroll)  # what runs the neuron; `parallel.over_time` puts another in its place

    @property
    def params(self) -> PyTree:
        """What the neuron's step is given."""
        values = (getattr(self, name) for name in self.params_type._fields)
        return self.params_type(*(v[...] if isinstance(v, nnx.Variable) else v for v in values))

    def init_state(self, xs: PyTree) -> PyTree:
        return self.neuron.init_state(jax.tree.leaves(values(xs))[0].shape[1:])

    def __call__(self, xs: PyTree, state: PyTree | None = None) -> tuple[PyTree, PyTree]:
        options = dict(implementation=self.implementation, out_dtype=self.out_dtype)
        return self.unroll(self.neuron, self.params, state, values(xs), **options)

    def trace(self, xs: Array, state: PyTree | None = None) -> tuple[tuple[Array, PyTree], PyTree]:
        """The same run with the state after every step: ((outs, states), state); `states` are float32 [T, *B, N]."""
        states_dtype = jax.tree.map(lambda _: jnp.float32, jax.eval_shape(lambda: self.init_state(xs)))
        out_dtype = (self.out_dtype or xs.dtype, states_dtype)
        neuron = WithState(self.neuron)
        return self.unroll(neuron, self.params, state, xs, implementation=self.implementation, out_dtype=out_dtype)


class IF(Spiking):
    """Integrate-and-fire, see `snnfuse.IF`."""

    def __init__(self, *, threshold=1.0, **options):
        super().__init__(neurons.IF, neurons.IFParams(threshold), **options)


class LIF(Spiking):
    """Leaky integrate-and-fire, see `snnfuse.LIF`."""

    def __init__(self, *, tau=None, decay=None, threshold=1.0, **options):
        super().__init__(neurons.LIF, neurons.LIFParams(_decay(tau, decay), threshold), **options)


class ParametricLIF(Spiking):
    """LIF that learns its time constant: 1 / tau = sigmoid(w), so that decay = 1 - 1 / tau stays in (0, 1).

    `layer.w` is the parameter, of `shape`; `tau` its initial value. As in SpikingJelly the input is decayed, unless
    decay_input=False. Fang et al. 2021, https://arxiv.org/abs/2007.05785.
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
        self.w = _parameter("w", -jnp.log(jnp.asarray(tau, jnp.float32) - 1), shape)

    @property
    def decay(self):
        return jax.nn.sigmoid(-self.w[...])


class CubaLIF(Spiking):
    """Current-based LIF: a synapse of `tau_syn` or `decay_syn` before the membrane, see `snnfuse.CubaLIF`."""

    def __init__(self, *, tau_syn=None, decay_syn=None, tau=None, decay=None, threshold=1.0, **options):
        decays = _decay(tau_syn, decay_syn, "_syn"), _decay(tau, decay)
        super().__init__(neurons.CubaLIF, neurons.CubaLIFParams(*decays, threshold), **options)


class AdaptiveLIF(Spiking):
    """LIF whose threshold rises by `beta` at each spike and comes back with `tau_adapt`, see `snnfuse.AdaptiveLIF`."""

    def __init__(self, *, tau=None, decay=None, tau_adapt=None, decay_adapt=None, beta=0.2, threshold=1.0, **options):
        decays = _decay(tau, decay), _decay(tau_adapt, decay_adapt, "_adapt")
        super().__init__(neurons.AdaptiveLIF, neurons.AdaptiveLIFParams(*decays, beta, threshold), **options)


class ExpIF(Spiking):
    """Exponential integrate-and-fire, see `snnfuse.ExpIF`."""

    def __init__(self, *, tau=None, decay=None, theta=0.8, delta=1.0, threshold=1.0, **options):
        super().__init__(neurons.ExpIF, neurons.ExpIFParams(_decay(tau, decay), theta, delta, threshold), **options)


class Izhikevich(Spiking):
    """Izhikevich's neuron in mV and ms, see `snnfuse.Izhikevich`."""

    def __init__(self, *, a=0.02, b=0.2, c=-65.0, d=8.0, threshold=30.0, **options):
        super().__init__(neurons.Izhikevich, neurons.IzhikevichParams(a, b, c, d, threshold), **options)


class LI(Spiking):
    """Leaky integrator, the usual readout: its output is its membrane, see `snnfuse.LI`."""

    def __init__(self, *, tau=None, decay=None, **options):
        super().__init__(neurons.LI, neurons.LIParams(_decay(tau, decay)), **options)


def _neuron(neuron, choices):
    fields = [f.name for f in dataclasses.fields(neuron)] if dataclasses.is_dataclass(neuron) else []
    if not isinstance(neuron, type):
        fields = []
    if unknown := [name for name in choices if name not in fields]:
        name = neuron.__name__ if isinstance(neuron, type) else type(neuron).__name__
        raise TypeError(f"{name} has no argument or choice {unknown[0]!r}; its choices are {fields}")
    return neuron(**choices) if isinstance(neuron, type) else neuron


def _check_learn(neuron, params, learn, shape):
    learn = (learn,) if isinstance(learn, str) else tuple(learn)
    if not hasattr(params, "_fields"):
        raise TypeError(f"params must be a NamedTuple; got {params!r}")
    names = tuple(name for name, value in params._asdict().items() if value is not None)
    if unknown := [name for name in learn if name not in names]:
        raise ValueError(f"learn must name parameters of {type(neuron).__name__}, {names}; got {unknown[0]!r}")
    if shape != () and not learn:
        raise ValueError(f"shape is that of the learned parameters, but learn names none; got shape {shape}")
    return learn


def _parameter(name, value, learned_shape):
    if learned_shape is None:
        return value if isinstance(value, Real) else Fixed(jnp.asarray(value))
    value = jnp.asarray(value, jnp.float32)
    if value.ndim and learned_shape == ():
        learned_shape = value.shape
    try:
        return nnx.Param(jnp.broadcast_to(value, learned_shape))
    except ValueError as e:
        raise ValueError(f"{name} must broadcast to shape {learned_shape}; got {value.shape}") from e


def _decay(tau, decay, suffix=""):
    tau_name, decay_name = "tau" + suffix, "decay" + suffix
    if (tau is None) == (decay is None):
        raise ValueError(f"give {tau_name} or {decay_name}, one of them; got {tau_name}={tau}, {decay_name}={decay}")
    if decay is None:
        if not _all(tau, lambda tau: tau > 1):
            raise ValueError(f"{tau_name} must be above 1 step, for {decay_name} = 1 - 1 / tau; got {tau}")
        return 1 - 1 / tau
    if not _all(decay, lambda decay: (decay >= 0) & (decay <= 1)):
        raise ValueError(f"{decay_name} must be in [0, 1]; got {decay}")
    return decay


def _all(value, holds):
    return isinstance(value, jax.core.Tracer) or bool(np.all(holds(np.asarray(value))))  # a tracer has no value yet
