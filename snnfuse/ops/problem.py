"""One checked call of `unroll`, and its step as flat jaxprs over lanes. Every implementation is given this."""

import math
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex
from jax.extend import source_info_util

from snnfuse.core.compose import StateOnly
from snnfuse.core.neuron import Neuron
from snnfuse.ops.packing import Packed

Leaves = tuple[jax.Array, ...]
Closed = Any  # what jax.make_jaxpr returns, with `jaxpr` and `consts`; since JAX 0.12 it has no class of its own


@dataclass(frozen=True)
class Step:
    """`neuron.step` over flat tuples of leaves. `constants[i]` is the value of a Python number in params, None for an array."""

    neuron: Neuron
    params_tree: Any
    state_tree: Any
    x_tree: Any
    constants: tuple[float | None, ...]

    def trees(self, params: Leaves, state: Leaves, x: Leaves):
        """(state, out) as the neuron returns them."""
        arrays = iter(params)
        params = self.params_tree.unflatten([next(arrays) if c is None else c for c in self.constants])
        return self.neuron.step(params, self.state_tree.unflatten(state), self.x_tree.unflatten(x))

    def __call__(self, params: Leaves, state: Leaves, x: Leaves) -> tuple[Leaves, Leaves]:
        state, out = self.trees(params, state, x)
        return tuple(jax.tree.leaves(state)), tuple(jax.tree.leaves(out))


@dataclass(frozen=True)
class Problem:
    """Everything static about one call. It is hashable, and compiled code is cached by it."""

    step: Step
    T: int
    lane_shape: tuple[int, ...]
    param_shapes: tuple[tuple[int, ...], ...]
    x_dtypes: tuple[Any, ...]
    out_dtypes: tuple[Any, ...]
    out_tree: Any
    dtype: Any
    initial: tuple[float, ...] | None  # the value of each leaf of a constant initial state; None: it is an argument
    reuse_cotangents: bool = False

    @property
    def M(self) -> int:
        return math.prod(self.lane_shape)

    @property
    def num_state(self) -> int:
        return self.step.state_tree.num_leaves

    @property
    def chunk_unit(self) -> int:
        """The chunk length must be a multiple of this, unless one chunk covers all T: the steps in a word of packed spikes."""
        return max((d.steps for d in self.out_dtypes if isinstance(d, Packed)), default=1)

    @property
    def state_only(self) -> "Problem":
        """The same call without outputs: it computes only the final state."""
        step = replace(self.step, neuron=StateOnly(self.step.neuron))
        return replace(self, step=step, out_dtypes=(), out_tree=jax.tree.structure(()))

    def out_struct(self, d, *lanes) -> jax.ShapeDtypeStruct:
        """The shape and dtype of an output of dtype `d`, over all T."""
        if isinstance(d, Packed):
            return jax.ShapeDtypeStruct((-(-self.T // d.steps), *lanes), d.word)
        return jax.ShapeDtypeStruct((self.T, *lanes), d)

    @property
    def differentiable(self) -> tuple[bool, ...]:
        """Which outputs carry a cotangent: those with a floating dtype."""
        return tuple(not isinstance(d, Packed) and bool(jnp.issubdtype(d, jnp.floating)) for d in self.out_dtypes)

    def _structs(self, shape):
        struct = jax.ShapeDtypeStruct(shape, self.dtype)
        return tuple((struct,) * n for n in (len(self.param_shapes), self.num_state, len(self.x_dtypes)))

    def step_jaxpr(self, shape) -> Closed:
        """(*params, *state, *x) -> (*state, *outs), every leaf of `shape`."""
        return self._of_any_size()._step_jaxpr(shape)

    def pullback_jaxpr(self, shape, wanted_params, wanted_xs, live_outs) -> Closed:
        """(*params, *state, *x, *d_state, *d_outs) -> (*d_state, *d_params, *d_x), every leaf of `shape`.

        The tuples of bools say which outputs have a cotangent, and which gradients are returned. d_state always is.
        """
        return self._of_any_size()._pullback_jaxpr(shape, wanted_params, wanted_xs, live_outs)

    def _of_any_size(self) -> "Problem":
        """This problem without its sizes, which its jaxprs do not depend on: layers of other sizes are traced once."""
        return replace(self, T=1, lane_shape=(), param_shapes=((),) * len(self.param_shapes), initial=None)

    @lru_cache(maxsize=128)  # noqa: B019  a Problem is a value
    def _step_jaxpr(self, shape):
        return _flat_jaxpr(self.step, *self._structs(shape))

    @lru_cache(maxsize=128)  # noqa: B019
    def _pullback_jaxpr(self, shape, wanted_params, wanted_xs, live_outs):
        params, state, x = self._structs(shape)

        def pullback(params, state, x, d_state, d_outs):
            def step(state, wanted):
                step_params, step_x = _put(params, wanted_params, wanted[0]), _put(x, wanted_xs, wanted[1])
                state, outs = self.step(step_params, state, step_x)
                return state, _pick(outs, live_outs)

            wanted = _pick(params, wanted_params), _pick(x, wanted_xs)
            return jax.vjp(step, state, wanted)[1]((d_state, d_outs))

        return _flat_jaxpr(pullback, params, state, x, state, x[:1] * sum(live_outs))

    def full_pullback_jaxpr(self, shape) -> Closed:
        """The pullback of all outputs to everything."""
        return self.pullback_jaxpr(
            shape, (True,) * len(self.param_shapes), (True,) * len(self.x_dtypes), self.differentiable
        )

    def why_not_lanewise(self, shape) -> str | None:
        """None if the step and its gradient treat every lane alike, so that a kernel may split the lanes into blocks."""
        name = type(self.step.neuron).__name__
        try:
            for trace in (self.step_jaxpr, self.full_pullback_jaxpr):
                if (fault := _mixing(trace(shape).jaxpr, shape)) is not None:
                    return f"neuron {name}: its step is not pointwise over lanes, {fault}"
            if _shapeless(self.step_jaxpr(shape)) != _shapeless(self.step_jaxpr(self.lane_shape)):
                return f"neuron {name}: its step depends on the shape of its inputs, a kernel sees {shape} at a time"
        except (TypeError, ValueError, IndexError, NotImplementedError) as e:
            return f"neuron {name}: its step cannot be traced on lanes of shape {shape}: {e}"
        return None


PARTS = {"bfloat16": 1, "bfloat16x2": 2, "float32": 3}  # precision: the bfloat16 numbers that a weight is the sum of


@dataclass(frozen=True)
class Recurrence:
    """The options of a call of `unroll_recurrent`. Its neuron gets the current x[t] + s[t-1] @ weight as input."""

    feedback: int
    precision: str
    heads: int
    starts: bool  # s[0] is an argument; otherwise it is 0

    @property
    def parts(self) -> int:
        return PARTS[self.precision]


def _pick(leaves, which):
    return tuple(leaf for leaf, w in zip(leaves, which, strict=True) if w)


def _put(leaves, which, values):
    values = iter(values)
    return tuple(next(values) if w else leaf for leaf, w in zip(leaves, which, strict=True))


# A step may use these primitives: an element of the output depends only on the input elements at the same place.
_POINTWISE = frozenset(
    """abs acos acosh add and asin asinh atan atan2 atanh broadcast_in_dim cbrt ceil clamp convert_element_type copy cos
    cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt integer_pow is_finite le lgamma log log1p logistic
    lt max min mul ne neg nextafter not or pow reduce_precision rem round rsqrt select_n sign sin sinh sqrt square sub
    tan tanh xor""".split()
)
_NO_MESH = jax.sharding.AbstractMesh((), ())
_CALLS = frozenset(
    "jit pjit closed_call core_call custom_jvp_call custom_vjp_call custom_vjp_call_jaxpr remat checkpoint remat2".split()
)


def _mixing(jaxpr, shape) -> str | None:
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        shapes = {v.aval.shape for v in (*eqn.invars, *eqn.outvars)}
        if name not in _POINTWISE or not shapes <= {(), shape}:
            return f"it uses `{name}` on shapes {[v.aval.shape for v in eqn.invars]}"
    return None


def _shapeless(closed: Closed):
    """The equations of a jaxpr without their shapes: primitive names and literal values."""
    return [
        (e.primitive.name, *(float(v.val) for v in e.invars if isinstance(v, jex.Literal))) for e in closed.jaxpr.eqns
    ]


def _flat_jaxpr(f, *structs) -> Closed:
    """The jaxpr of f over flat leaves, with every call inlined and no constants: equations of primitives only."""
    leaves, tree = jax.tree.flatten(structs)

    def flat(*args):
        return tuple(jax.tree.leaves(f(*tree.unflatten(args))))

    with jax.sharding.use_abstract_mesh(_NO_MESH):  # a lane is on one device, whatever mesh the caller is under
        traced = jax.make_jaxpr(flat)(*leaves)
        return jax.make_jaxpr(partial(_evaluate, traced.jaxpr, [_scalar(c) for c in traced.consts]))(*leaves)


def _scalar(const):
    if jnp.size(const) != 1:
        raise ValueError(f"the step closes over an array of shape {jnp.shape(const)}; hand it over in params")
    return np.asarray(const).item()


def _power(x, y):
    """x to an integer power, by repeated squaring, because kernel compilers compile `integer_pow` differently."""
    if y < 0:
        return 1.0 / _power(x, -y)
    if y == 0:
        return jnp.ones_like(x)
    half = _power(x, y // 2) if y > 1 else None
    return x if y == 1 else half * half if y % 2 == 0 else half * half * x


def _evaluate(jaxpr, consts, *args, traceback=None):
    """Evaluate a jaxpr equation by equation, with all calls inlined.

    Each equation keeps the source line of the neuron that made it; an equation inside a call keeps the line of the call.
    """
    env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
    for eqn in jaxpr.eqns:
        here = traceback or eqn.source_info.traceback
        with source_info_util.user_context(here):
            values = [v.val if isinstance(v, jex.Literal) else env[v] for v in eqn.invars]
            name = eqn.primitive.name
            if name in _CALLS:
                inner = next(p for k in ("jaxpr", "call_jaxpr", "fun_jaxpr") if (p := eqn.params.get(k)) is not None)
                inner, inner_consts = getattr(inner, "jaxpr", inner), getattr(inner, "consts", ())
                results = _evaluate(inner, [_scalar(c) for c in inner_consts], *values, traceback=here)
            elif name == "add_any":  # a sum of cotangents; not every kernel compiler has this primitive
                results = [values[0] + values[1]]
            elif name == "stop_gradient" or (name == "reshape" and jnp.shape(values[0]) == eqn.outvars[0].aval.shape):
                results = values[:1]
            elif name == "one_minus_square":  # in the gradient of tanh since JAX 0.11; computed as JAX does
                results = [(1.0 + values[0]) * (1.0 - values[0])]
            elif name == "integer_pow":
                results = [_power(values[0], eqn.params["y"])]
            elif name == "convert_element_type" and jnp.result_type(values[0]) == jnp.bool_:
                # a select, because kernel compilers compile this cast differently too
                dtype = eqn.params["new_dtype"]
                results = [jax.lax.select(values[0], jnp.ones_like(values[0], dtype), jnp.zeros_like(values[0], dtype))]
            else:
                results = eqn.primitive.bind(*values, **eqn.params)
                results = results if eqn.primitive.multiple_results else [results]
            env.update(zip(eqn.outvars, results, strict=True))
    return [v.val if isinstance(v, jex.Literal) else env[v] for v in jaxpr.outvars]
