"""Triton source from a neuron's own step: the kernels around its forward and pullback jaxprs (`triton_equations`).

The text has four kinds of function. `step` and `pullback` are the two jaxprs, `load_chunk` loads K steps, `forward_chunk`
and `backward_chunk` take them, `snn_forward` and `snn_backward` are the kernels (for what these do, see `snnfuse.ops.fused`). Nothing here
needs Triton: the text is compiled by `snnfuse.ops.triton`.
"""

import re
import textwrap

import jax
import numpy as np

from snnfuse.ops import triton_equations as equations
from snnfuse.ops.blocks import Blocks
from snnfuse.ops.fused import Wanted
from snnfuse.ops.packing import Packed
from snnfuse.ops.problem import Problem

Periods = tuple[int, ...]  # of each array in params: lane m reads element m % period


def why_not(problem: Problem, lanes: int) -> str | None:
    """None if every equation of the step and its gradient has a Triton expression."""
    name = type(problem.step.neuron).__name__
    for closed in (problem.forward((lanes,)), problem.full_pullback((lanes,))):
        for eqn in equations.live(closed.jaxpr):
            try:
                equations.expression(eqn, ["0.0"] * len(eqn.invars))
            except NotImplementedError as e:
                return f"neuron {name}: {e}"
    return None


def forward(problem: Problem, blocks: Blocks, periods: Periods, save: bool) -> str:
    """A module with the kernel `snn_forward(*params, *state, *xs, chunks, *outs, *final state, *checkpoints)`."""
    names = _Names(problem)
    return _module(problem, _step(problem, names, blocks.lanes)[0], _forward(problem, names, blocks, periods, save))


def backward(problem: Problem, blocks: Blocks, periods: Periods, wanted: Wanted, live_outs, live_state) -> str:
    """A module with the kernel `snn_backward(*params, *state, *checkpoints, *xs, *d_outs, *d_state, chunks,
    *d_params, *d_state, *d_xs)`, of the cotangents that are live and the gradients wanted."""
    names = _Names(problem)
    step, known = _step(problem, names, blocks.lanes)
    pullback = _pullback(problem, names, blocks.lanes, wanted, live_outs, known)
    return _module(problem, step, pullback, _backward(problem, names, blocks, periods, wanted, live_outs, live_state))


def both(problem: Problem, blocks: Blocks, periods: Periods) -> str:
    """Both kernels of a training step in one module, for reading."""
    names = _Names(problem)
    wanted = Wanted((True,) * len(names.params), (problem.initial is None,) * len(names.state), (True,) * len(names.xs))
    live_outs, live_state = problem.differentiable, (True,) * len(names.state)
    step, known = _step(problem, names, blocks.lanes)
    return _module(
        problem,
        step,
        _forward(problem, names, blocks, periods, save=True),
        _pullback(problem, names, blocks.lanes, wanted, live_outs, known),
        _backward(problem, names, blocks, periods, wanted, live_outs, live_state),
    )


def _module(problem, *functions):
    neuron = re.sub(r" at 0x[0-9a-f]+", "", repr(problem.step.neuron))  # the same text in every process
    about = textwrap.wrap(neuron, 117) or [""]
    imports = "import triton\nimport triton.language as tl\n"
    if any("libdevice." in f for f in functions):
        imports += "from triton.language.extra import libdevice\n"
    return "\n\n".join(["\n".join(f"# {line}" for line in about) + "\n" + imports, *functions])


class _Names:
    """The neuron's own names for its leaves, made unique."""

    def __init__(self, problem: Problem):
        step, taken = problem.step, set(equations.RESERVED)
        params = _leaf_names(step.params_tree, "param")
        params = [p for p, c in zip(params, step.constants, strict=True) if c is None]
        self.params = [_unique(n, taken) for n in params]
        self.state = [_unique(n, taken) for n in _leaf_names(step.state_tree, "state")]
        self.xs = [_unique(n, taken) for n in _leaf_names(step.x_tree, "x", full=True)]
        self.outs = [_unique(n, taken) for n in _leaf_names(problem.out_tree, "out", full=True)]


def _leaf_names(tree, root, full=False):
    """The last word of each leaf's key path, or all of them after `root` where that is not unique or `full`."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree.unflatten(range(tree.num_leaves)))]
    words = [re.findall(r"\w+", jax.tree_util.keystr(path)) for path in paths]
    short = [w[-1] if w and not w[-1].isdigit() else None for w in words]
    if full or None in short or len(set(short)) < len(short):
        return ["_".join([root, *w]) for w in words]
    return short


def _unique(name, taken):
    """A name none of whose relatives in the text is taken."""
    relatives = (
        "{0}",
        "d_{0}",
        "{0}_new",
        "d_{0}_new",
        "{0}_at",
        "d_{0}_at",
        "{0}_ahead",
        "{0}_tail",
        "d_{0}_here",
        "{0}_word",
    )
    while not taken.isdisjoint(family := [form.format(name) for form in relatives]):
        name += "_"
    taken.update(family)
    return name


# ---- the two jaxprs


def _step(problem, names, lanes):
    """(the text of `step`, the name of each expression in it)."""
    jaxpr = problem.forward((lanes,)).jaxpr
    inputs = [*names.params, *names.state, *names.xs]
    outputs = [f"{s}_new" for s in names.state] + names.outs
    return equations.function("step", jaxpr, inputs, outputs, hints=equations.assigned(jaxpr))


def _pullback(problem, names, lanes, wanted, live_outs, known):
    jaxpr = problem.pullback((lanes,), wanted.params, wanted.xs, live_outs).jaxpr
    inputs = [*names.params, *names.state, *names.xs, *(f"d_{s}_new" for s in names.state)]
    inputs += [f"d_{o}" for o in _pick(names.outs, live_outs)]
    outputs = [f"d_{s}" for s in names.state]
    outputs += [f"d_{n}" for n in (*_pick(names.params, wanted.params), *_pick(names.xs, wanted.xs))]
    return equations.function("pullback", jaxpr, inputs, outputs, known=known)[0]


# ---- the kernels


def _forward(problem, names, blocks, periods, save):
    T, K = problem.T, blocks.chunk
    save = save and T > K
    masked = _masked(problem, blocks)
    x_ptrs, out_ptrs = _ptrs(names.xs), _ptrs(names.outs)
    packed = {o: d for o, d in zip(names.outs, problem.out_dtypes, strict=True) if isinstance(d, Packed)}
    at = ["at", *(f"{o}_at" for o in packed)]
    load, loaded = _load_chunk("load_chunk", names.xs, masked)

    steps = ["for k in tl.static_range(K):"]
    steps += [_indent(_assign((*names.state, *names.outs), "step", _args(names.params, names.state, _at_k(names.xs))))]
    for o in names.outs:
        if o in packed:
            steps += map(_indent, _pack(o, packed[o].steps, masked))
        else:
            steps += [_indent(_store(f"{o}_ptr + at + k * M", f"{o}.to({o}_ptr.dtype.element_ty)", masked))]
    chunk = _define(
        "forward_chunk",
        [*names.params, *names.state, *loaded, *out_ptrs, *at, *masked, "M: tl.constexpr", "K: tl.constexpr"],
        [*steps, *_return(names.state)],
    )

    def checkpoint(c, *conditions):
        mask = [" & ".join([*masked, *conditions])] if masked or conditions else []
        where = f"{_row(f'({c} - 1)', 'M', problem)} + lane"
        return [_store(f"{s}_saved_ptr + {where}", s, mask) for s in names.state if save]

    def loads(c, size, suffix=""):
        at = f"{_row(c, 'K * M', problem)} + lane"
        return [_assign([n + suffix for n in loaded], "load_chunk", _args(x_ptrs, [at], masked, ["M", size]))]

    def call(c, size, suffix=""):
        at_here = [n + suffix for n in at]
        strides = ["K * M", *(f"(K // {d.steps}) * M" for d in packed.values())]
        lines = [f"{n} = {_row(c, stride, problem)} + lane" for n, stride in zip(at_here, strides, strict=True)]
        loaded_here = [n + suffix for n in loaded]
        args = _args(names.params, names.state, loaded_here, out_ptrs, at_here, masked, ["M", size])
        return [*lines, _assign(names.state, "forward_chunk", args)]

    body = [*_lanes(masked), *_load_params(problem, names, periods, masked), *_initial(problem, names, masked)]
    if blocks.prefetch and T >= 2 * K:
        body += [*loads("0", "K"), "for c in range(chunks):"]
        body += map(_indent, [_AHEAD.format("tl.minimum(c + 1, chunks - 1)"), *loads("ahead", "K", "_ahead")])
        body += map(_indent, [*checkpoint("c", "(c > 0)"), *call("c", "K"), *(f"{n} = {n}_ahead" for n in loaded)])
    else:
        body += [
            "for c in range(chunks):",
            *map(_indent, [*checkpoint("c", "(c > 0)"), *loads("c", "K"), *call("c", "K")]),
        ]
    if T % K:
        body += [
            *checkpoint("chunks"),
            *loads("chunks", "TAIL", "_tail"),
            *call("chunks", "TAIL", "_tail"),
        ]  # the last, short chunk
    body += [_store(f"{s}_end_ptr + lane", s, masked) for s in names.state]
    args = [*_ptrs(names.params), *_start(problem, names), *x_ptrs, "chunks", *out_ptrs, *_ptrs(names.state, "_end")]
    args += _ptrs(names.state if save else (), "_saved")
    return "\n\n".join([load, chunk, _define("snn_forward", [*args, *_CONSTEXPRS], body)])


def _pack(out, steps, masked):
    """Bit k of a word is 1 where the output of step k is not 0; a chunk begins with a word."""
    return [
        f"bit = ({out} != 0).to(tl.uint{steps}) << (k % {steps})",
        f"{out}_word = bit if k % {steps} == 0 else {out}_word | bit",
        f"if k % {steps} == {steps - 1} or k == K - 1:",
        _indent(_store(f"{out}_ptr + {out}_at + (k // {steps}) * M", f"{out}_word", masked)),
    ]


def _backward(problem, names, blocks, periods, wanted, live_outs, live_state):
    T, K = problem.T, blocks.chunk
    saved = T > K
    masked = _masked(problem, blocks)
    d_outs, d_xs = _d(_pick(names.outs, live_outs)), _d(_pick(names.xs, wanted.xs))
    d_params, d_state = _d(_pick(names.params, wanted.params)), _d(names.state)
    load, loaded = _load_chunk("load_chunk_backward", (*names.xs, *d_outs), masked)

    steps = [f"{s}_at = ({s},)" for s in names.state]
    steps += ["for k in tl.static_range(K - 1):  # the state before each step, again"]
    replay = (*names.state, *("_" for _ in names.outs))
    steps += [_indent(_assign(replay, "step", _args(names.params, _at_k(names.state), _at_k(names.xs))))]
    steps += [_indent(f"{s}_at += ({s},)") for s in names.state]
    steps += ["for k in tl.static_range(K - 1, -1, -1):"]
    here = [f"{d}_here" for d in d_params]
    args = _args(names.params, _at_k(names.state), _at_k(names.xs), d_state, _at_k(d_outs))
    steps += [_indent(_assign((*d_state, *here, *d_xs), "pullback", args))]
    steps += [_indent(f"{d} += {h}") for d, h in zip(d_params, here, strict=True)]
    steps += [_indent(_store(f"{d}_ptr + at + k * M", f"{d}.to({d}_ptr.dtype.element_ty)", masked)) for d in d_xs]
    inputs = [*names.params, *names.state, *d_params, *d_state, *loaded, *_ptrs(d_xs), "at", *masked]
    chunk = _define(
        "backward_chunk",
        [*inputs, "M: tl.constexpr", "K: tl.constexpr"],
        [*steps, *_return((*d_params, *d_state))],
    )

    def loads(c, size, suffix="", first=True):
        """What chunk c needs: the state before it, a checkpoint or for the first one the initial state; and its inputs."""
        states = [s + suffix for s in names.state]
        lines = []
        if first:
            mask = [" & ".join([*masked, f"({c} == 0)"])] if saved else masked
            lines += _initial(problem, names, mask, suffix)
        for s, state in zip(names.state, states, strict=True) if saved else ():
            conditions = [*masked, *([f"({c} > 0)"] if first else [])]
            masking = f", mask={' & '.join(conditions)}, other={state if first else 0.0}" if conditions else ""
            lines += [f"{state} = tl.load({s}_saved_ptr + {_row(f'({c} - 1)', 'M', problem)} + lane{masking})"]
        at = f"{_row(c, 'K * M', problem)} + lane"
        args = _args(_ptrs(names.xs), _ptrs(d_outs), [at], masked, ["M", size])
        return [*lines, _assign([n + suffix for n in loaded], "load_chunk_backward", args)]

    def call(c, size, suffix=""):
        at = f"at{suffix} = {_row(c, 'K * M', problem)} + lane"
        here = [n + suffix if n in (*names.state, *loaded, "at") else n for n in inputs]
        return [at, _assign((*d_params, *d_state), "backward_chunk", _args(here, ["M", size]))]

    body = [*_lanes(masked), *_load_params(problem, names, periods, masked)]
    body += [f"{d} = tl.zeros([BLOCK], tl.float32)" for d in d_params]
    for d, live in zip(d_state, live_state, strict=True):
        body += [f"{d} = {_load(f'{d}_end_ptr + lane', masked)}" if live else f"{d} = tl.zeros([BLOCK], tl.float32)"]
    if T % K:
        body += [
            *loads("chunks", "TAIL", "_tail", first=False),
            *call("chunks", "TAIL", "_tail"),
        ]  # the last, short chunk
    if blocks.prefetch and T >= 2 * K:
        body += [*loads("(chunks - 1)", "K", first=False), "for i in range(chunks):", "    c = chunks - 1 - i"]
        body += map(_indent, [_AHEAD.format("tl.maximum(c - 1, 0)"), *loads("ahead", "K", "_ahead"), *call("c", "K")])
        body += [f"    {n} = {n}_ahead" for n in (*names.state, *loaded)]
    else:
        body += ["for i in range(chunks):", *map(_indent, ["c = chunks - 1 - i", *loads("c", "K"), *call("c", "K")])]
    body += [_store(f"{d}_ptr + lane", d, masked) for d in d_params]
    wanted_state = _pick(d_state, wanted.state) if wanted.state else []
    body += [_store(f"{d}_start_ptr + lane", d, masked) for d in wanted_state]
    args = [*_ptrs(names.params), *_start(problem, names), *_ptrs(names.state if saved else (), "_saved")]
    args += [*_ptrs(names.xs), *_ptrs(d_outs), *_ptrs(_pick(d_state, live_state), "_end"), "chunks"]
    args += [*_ptrs(d_params), *_ptrs(wanted_state, "_start"), *_ptrs(d_xs)]
    return "\n\n".join([load, chunk, _define("snn_backward", [*args, *_CONSTEXPRS], body)])


_AHEAD = "ahead = {}  # loaded while chunk c is computed"
_CONSTEXPRS = [f"{name}: tl.constexpr" for name in ("M", "K", "TAIL", "BLOCK")]


def _masked(problem, blocks):
    """["mask"] if some program has lanes beyond M, else []."""
    return ["mask"] if problem.M % blocks.lanes else []


def _lanes(masked):
    return ["lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)", *(f"{mask} = lane < M" for mask in masked)]


def _row(index, stride, problem):
    """An offset, in 64 bits where 32 would not do."""
    return f"tl.cast({index}, tl.int64) * {stride}" if problem.T * problem.M >= 2**31 else f"{index} * {stride}"


def _load_params(problem, names, periods, masked):
    lines = []
    for name, period in zip(names.params, periods, strict=True):
        if period == 1:
            lines.append(f"{name} = tl.full([BLOCK], tl.load({name}_ptr).to(tl.float32), tl.float32)")
        else:
            where = "lane" if period == problem.M else f"lane % {period}"
            lines.append(f"{name} = {_load(f'{name}_ptr + {where}', masked)}.to(tl.float32)")
    return lines


def _initial(problem, names, masked, suffix=""):
    if problem.initial is None:
        return [f"{s}{suffix} = {_load(f'{s}_start_ptr + lane', masked)}" for s in names.state]
    values = zip(names.state, problem.initial, strict=True)
    return [
        f"{s}{suffix} = tl.full([BLOCK], {equations.literal(np.float32(value))}, tl.float32)" for s, value in values
    ]


def _start(problem, names):
    return _ptrs(names.state if problem.initial is None else (), "_start")


def _load_chunk(function, names, masked):
    """(a function that loads K steps of some sequences, the names of what it returns)."""
    at = [f"{n}_at" for n in names]
    lines = [f"{n} = ()" for n in at]
    lines += ["for k in tl.static_range(K):  # all loads before any use: they are in flight together"]
    lines += [f"    {n}_at += ({_load(f'{n}_ptr + at + k * M', masked)}.to(tl.float32),)" for n in names]
    args = [*_ptrs(names), "at", *masked, "M: tl.constexpr", "K: tl.constexpr"]
    return _define(function, args, [*lines, *_return(at)]), at


def _load(where, masked):
    return f"tl.load({where}, mask={masked[0]}, other=0.0)" if masked else f"tl.load({where})"


def _store(where, what, mask):
    return f"tl.store({where}, {what}{f', mask={mask[0]}' if mask else ''})"


def _define(name, args, lines):
    return f"@triton.jit\n{_wrapped(f'def {name}(', args, '):')}\n" + "\n".join(map(_indent, lines)) + "\n"


def _assign(targets, function, args):
    return _wrapped(f"{', '.join(targets)} = {function}(" if targets else f"{function}(", args, ")")


def _wrapped(opening, args, closing, width=110):
    """A call or a signature, on one line if that is not too long."""
    if len(line := opening + ", ".join(args) + closing) <= width:
        return line
    lines = [""]
    for arg in args:
        if len(lines[-1]) + len(arg) > width:
            lines.append("")
        lines[-1] += f"{arg}, "
    return "\n".join([opening, *(_indent(line.rstrip()) for line in lines), closing])


def _args(*groups):
    return [a for group in groups for a in group]


def _return(names):
    return [f"return {', '.join(names)}"] if names else []


def _indent(lines):
    return textwrap.indent(lines, "    ")


def _ptrs(names, suffix=""):
    return [f"{n}{suffix}_ptr" for n in names]


def _at_k(names):
    return [f"{n}_at[k]" for n in names]


def _d(names):
    return [f"d_{n}" for n in names]


def _pick(values, which):
    return [v for v, w in zip(values, which, strict=True) if w]
