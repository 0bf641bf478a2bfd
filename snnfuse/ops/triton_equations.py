"""Turns a flat jaxpr over lanes into the text of one Triton function. One table maps primitives to expressions."""

import linecache
import os
import re
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

_NAN_WINS = "propagate_nan=tl.PropagateNan.ALL"

# JAX primitive: Triton expression of its operands; lanes are float32 or bool. Where Triton offers a choice, we take what
# XLA does on a GPU: `/` is div.full (2 ulp), exp and its like are those of libdevice (tl.exp is exp2 of a rounded product).
TABLE = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "div": "{0} / {1}",
    "neg": "-{0}",
    "abs": "tl.abs({0})",
    "sign": "tl.where({0} > 0.0, 1.0, tl.where({0} < 0.0, -1.0, {0}))",
    "max": f"tl.maximum({{0}}, {{1}}, {_NAN_WINS})",
    "min": f"tl.minimum({{0}}, {{1}}, {_NAN_WINS})",
    "clamp": f"tl.minimum(tl.maximum({{1}}, {{0}}, {_NAN_WINS}), {{2}}, {_NAN_WINS})",
    "select_n": "tl.where({0}, {2}, {1})",
    "eq": "{0} == {1}",
    "ne": "{0} != {1}",
    "lt": "{0} < {1}",
    "le": "{0} <= {1}",
    "gt": "{0} > {1}",
    "ge": "{0} >= {1}",
    "and": "{0} & {1}",
    "or": "{0} | {1}",
    "xor": "{0} ^ {1}",
    "not": "~{0}",
    "is_finite": 'tl.abs({0}) < float("inf")',
    "square": "{0} * {0}",
    "sqrt": "tl.sqrt_rn({0})",
    "rsqrt": "libdevice.rsqrt({0})",
    "logistic": "1.0 / (1.0 + libdevice.exp(-{0}))",
    "floor": "tl.floor({0})",
    "ceil": "tl.ceil({0})",
    "rem": "libdevice.fmod({0}, {1})",
    "erf_inv": "libdevice.erfinv({0})",
    **{name: f"libdevice.{name}({{0}}, {{1}})" for name in "pow atan2 nextafter".split()},
    **{
        name: f"libdevice.{name}({{0}})"
        for name in """exp exp2 expm1 log log1p erf erfc lgamma cbrt sin cos tan sinh cosh tanh asin acos atan asinh acosh
        atanh""".split()
    },
}
_COMPUTED, _ROUNDED = (
    {"float32", "bool"},
    {"bfloat16", "float16"},
)  # the dtypes of lanes, and those that a step may round to
RESERVED = frozenset(
    """ahead at at_tail bit c chunks first group i k lane mask step pullback load_chunk load_chunk_backward forward_chunk backward_chunk snn_forward snn_backward M K TAIL
    BLOCK GROUPS UNIT units part wrap0 wrap1 wrap2 wrap3 wrap4 wrap5 wrap6 wrap7
    at_wrap0 at_wrap1 at_wrap2 at_wrap3 at_wrap4 at_wrap5 at_wrap6 at_wrap7
    row neuron current back weight_at fed_at get put split product load_weight snn_recurrent_forward snn_recurrent_backward
    SIZE ROWS HEAD HEADS PARTS tl triton
    weight fed block head source every every_at every_at_tail head_mask whole count rest part meet arrive wait everyone
    WIDTH STACK PROGRAMS SLOTS
    libdevice float range and as assert break class continue def del elif else except finally for from global if import in
    is lambda nonlocal not or pass raise return try while with yield None True False async await""".split()
)


def function(name, jaxpr, inputs, outputs, *, known=(), hints=()):
    """(the text of a jaxpr as a function, the name of each expression in it).

    A comment above each equation quotes the line of the neuron's source that it came from. A value gets its name from the
    first of these that has one: the same expression in `known`, its variable in `hints`, the output that it is. Equal
    expressions are written once.
    """
    known, hints = dict(known), dict(hints)
    taken = {*RESERVED, *inputs}
    env = dict(zip(jaxpr.invars, inputs, strict=True))
    for var, output in zip(jaxpr.outvars, outputs, strict=True):
        if not isinstance(var, jex.Literal):
            hints.setdefault(var, output)
    reserved = {*known.values(), *hints.values(), *outputs}
    written, lines, comment = {}, [], None
    for eqn in live(jaxpr):
        (var,) = eqn.outvars
        if all(isinstance(_read(env, v), np.generic) for v in eqn.invars):
            env[var] = _fold(eqn, [_read(env, v) for v in eqn.invars])
            continue
        text = expression(eqn, [literal(_read(env, v)) for v in eqn.invars])
        if text in written or text in taken:  # written before, or a plain copy
            env[var] = written.get(text, text)
            continue
        wish = known.get(text) or hints.get(var)
        if wish is None or wish in taken:
            wish = next(n for n in _numbered(wish) if n not in taken and n not in reserved)
        taken.add(wish)
        written[text] = env[var] = wish
        if (line := _source_line(eqn)) not in (None, comment):
            lines.append(f"# {line}")
            comment = line
        lines.append(f"{wish} = {text}")
    like = inputs[-1]
    lines.append(
        "return "
        + ", ".join(_full(r, like) if isinstance(r := _read(env, v), np.generic) else r for v in jaxpr.outvars)
    )
    return f"@triton.jit\ndef {name}({', '.join(inputs)}):\n" + textwrap.indent(
        "\n".join(lines), "    "
    ) + "\n", written


def _numbered(wish):
    stem = wish or "t"
    yield from (f"{stem}_new",) if wish else ()
    i = 1
    while True:
        yield f"{stem}{i}"
        i += 1


def expression(eqn, operands):
    name, params = eqn.primitive.name, eqn.params
    dtypes = {v.aval.dtype.name for v in (*eqn.invars, *eqn.outvars) if not isinstance(v, jex.Literal)}
    if odd := dtypes - _COMPUTED - (_ROUNDED if name == "convert_element_type" else set()):
        raise NotImplementedError(f"its step computes `{name}` in {', '.join(sorted(odd))}, not in float32")
    if name in ("broadcast_in_dim", "copy"):
        return operands[0]
    if name == "convert_element_type":
        if eqn.invars[0].aval.dtype == eqn.outvars[0].aval.dtype:
            return operands[0]
        to = params["new_dtype"]
        return f"{operands[0]} != 0.0" if to == jnp.bool_ else f"{operands[0]}.to(tl.{jnp.dtype(to).name})"
    if name == "select_n" and operands[1:] == ["0.0", "1.0"]:
        return f"{operands[0]}.to(tl.float32)"
    if name == "round":
        to_even = params["rounding_method"] == jax.lax.RoundingMethod.TO_NEAREST_EVEN
        return f"libdevice.{'rint' if to_even else 'round'}({operands[0]})"
    if name == "reduce_precision":
        narrow = {(8, 23): "float32", (8, 7): "bfloat16", (5, 10): "float16"}
        if (bits := (params["exponent_bits"], params["mantissa_bits"])) in narrow:
            return f"{operands[0]}.to(tl.{narrow[bits]}).to(tl.float32)"
    if name not in TABLE:
        raise NotImplementedError(f"its step uses `{name}`, which has no Triton expression here")
    return TABLE[name].format(*operands)


def live(jaxpr):
    """The equations that the outputs need."""
    needed = {v for v in jaxpr.outvars if not isinstance(v, jex.Literal)}
    kept = []
    for eqn in reversed(jaxpr.eqns):
        if needed.intersection(eqn.outvars):
            kept.append(eqn)
            needed.update(v for v in eqn.invars if not isinstance(v, jex.Literal))
    return kept[::-1]


def _read(env, var):
    if not isinstance(var, jex.Literal):
        return env[var]
    return np.bool_(var.val) if var.aval.dtype == jnp.bool_ else np.float32(var.val)


def _fold(eqn, values):
    if eqn.primitive.name in ("broadcast_in_dim", "copy"):
        return values[0]
    with jax.ensure_compile_time_eval():
        return np.asarray(eqn.primitive.bind(*map(jnp.asarray, values), **eqn.params))[()]


def literal(value):
    if isinstance(value, str):
        return value
    if isinstance(value, np.bool_):
        return str(bool(value))
    if not np.isfinite(value):
        return f'float("{value}")'
    if 0 < abs(value) < np.finfo(np.float32).tiny:
        return f"tl.cast({value}, tl.float32)"  # Triton would take it for a float64
    return str(value)  # the shortest that reads back as the same float32


def _full(value, like):
    return f"tl.full({like}.shape, {literal(value)}, tl.{'int1' if isinstance(value, np.bool_) else 'float32'})"


_NOT_THE_NEURONS = (os.path.dirname(jax.__file__) + os.sep, os.path.dirname(os.path.abspath(__file__)) + os.sep)


def _frames(eqn):
    """(file, line) of the neuron's code that made an equation, innermost first."""
    traceback = eqn.source_info.traceback
    for frame in traceback.frames if traceback is not None else ():
        if frame.file_name.startswith(_NOT_THE_NEURONS[1]):
            return
        if not frame.file_name.startswith(_NOT_THE_NEURONS[0]):
            yield frame.file_name, frame.line_num


def _source_line(eqn):
    line = next((linecache.getline(*frame).strip() for frame in _frames(eqn)), "")
    return line.removeprefix("return ") or None


def assigned(jaxpr):
    """Names for values: the last equation that comes from a line `name = ...` of the neuron's code gets that name."""
    last = {frame: eqn.outvars[0] for eqn in jaxpr.eqns for frame in _frames(eqn)}
    names = {}
    for frame, var in last.items():
        if (match := re.match(r"\s*([A-Za-z]\w*) = ", linecache.getline(*frame))) and var not in names:
            names[var] = match[1]
    return names
