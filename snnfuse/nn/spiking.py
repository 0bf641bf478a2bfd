"""Any neuron as a module: it makes the parameters, stores the choices and calls `snnfuse.unroll`. nn/neurons.py has our neurons."""

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
            if not all_hold(value, lambda value: ~np.isnan(value)):
                raise ValueError(f"{name} must not be NaN; got {value}")
            if (how := learn.get(name)) is None:
                setattr(self, name, value if isinstance(value, Real) else Fixed(jnp.asarray(value)))
            elif (kept := RANGES[how]) is None:
                setattr(self, name, learned(name, value, shape))
            else:
                if not all_hold(value, lambda value, kept=kept: kept.holds(np.asarray(value, np.float32))):
                    raise ValueError(
                        f"{name} must be {kept.text} to be learned by {how!r}; got {value}. "
                        f"learn={{{name!r}: 'raw'}} learns it without bounds"
                    )
                setattr(self, f"raw_{name}", learned(name, kept.inverse(jnp.asarray(value, jnp.float32)), shape))

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


# The names of arguments in other libraries: our names.
NAMES_ELSEWHERE = {
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
            close = NAMES_ELSEWHERE.get(name, "")
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


def learned(name, value, shape):
    value = jnp.asarray(value, jnp.float32)
    if value.ndim and shape == ():
        shape = value.shape
    try:
        return nnx.Param(jnp.broadcast_to(value, shape))
    except ValueError as e:
        raise ValueError(f"{name} must broadcast to shape {shape}; got {value.shape}") from e


def all_hold(value, holds):
    return isinstance(value, jax.core.Tracer) or bool(
        np.all(holds(np.asarray(value)))
    )  # a tracer has no value to check
