"""Triton source from a neuron's own step: the kernels around its forward and pullback jaxprs (`triton_equations`).

The text has four kinds of function:

    step, pullback                   the two jaxprs
    load_chunk                       loads K steps
    forward_chunk, backward_chunk    run them
    snn_forward, snn_backward        the kernels; `snnfuse.ops.fused` says what they do

The number of lanes, the number of chunks and most numbers of channels are arguments of a kernel, so layers of other sizes
share it: the 34 kernels of a ResNet-18 are 8 to compile.

This file needs no Triton. `snnfuse.ops.triton` compiles the text.
"""

import numpy as np

from snnfuse.ops import triton_equations as equations
from snnfuse.ops.blocks import Blocks
from snnfuse.ops.fused import Wanted
from snnfuse.ops.packing import Packed
from snnfuse.ops.problem import Problem
from snnfuse.ops.triton_text import (
    LOAD_CHUNK,
    Names,
    Periods,
    at_step,
    call,
    d_of,
    fill,
    module,
    pick,
    pointers,
    pullback_function,
    returned,
    step_function,
)


def why_not(problem: Problem, shape: tuple[int, ...]) -> str | None:
    """None if every equation of the step and its gradient has a Triton expression."""
    name = type(problem.step.neuron).__name__
    for closed in (problem.step_jaxpr(shape), problem.full_pullback_jaxpr(shape)):
        for eqn in equations.live(closed.jaxpr):
            try:
                equations.expression(eqn, ["0.0"] * len(eqn.invars))
            except NotImplementedError as e:
                return f"neuron {name}: {e}"
    return None


def forward_text(problem: Problem, blocks: Blocks, periods: Periods, save: bool) -> str:
    """A module with the kernel `snn_forward(*params, *state, *xs, chunks, *outs, *final state, *checkpoints)`."""
    names = Names(problem)
    return module(
        problem, step_function(problem, names, (blocks.lanes,))[0], _forward(problem, names, blocks, periods, save)
    )


def backward_text(problem: Problem, blocks: Blocks, periods: Periods, wanted: Wanted, live_outs, live_state) -> str:
    """A module with the kernel `snn_backward(*params, *state, *checkpoints, *xs, *d_outs, *d_state, chunks,
    *d_params, *d_state, *d_xs)`. It has only the cotangents that are not zero and the gradients that are wanted."""
    names = Names(problem)
    step, known = step_function(problem, names, (blocks.lanes,))
    pullback = pullback_function(problem, names, (blocks.lanes,), wanted, live_outs, known)
    return module(problem, step, pullback, _backward(problem, names, blocks, periods, wanted, live_outs, live_state))


def module_text(problem: Problem, blocks: Blocks, periods: Periods) -> str:
    """Both kernels of a training step in one module, for reading."""
    names = Names(problem)
    wanted = Wanted((True,) * len(names.params), (problem.initial is None,) * len(names.state), (True,) * len(names.xs))
    live_outs, live_state = problem.differentiable, (True,) * len(names.state)
    step, known = step_function(problem, names, (blocks.lanes,))
    return module(
        problem,
        step,
        _forward(problem, names, blocks, periods, save=True),
        pullback_function(problem, names, (blocks.lanes,), wanted, live_outs, known),
        _backward(problem, names, blocks, periods, wanted, live_outs, live_state),
    )


_FORWARD = """
@triton.jit
def forward_chunk({chunk_arguments}):
    for k in tl.static_range(K):
        {step}
        {store}
    {give_back}


@triton.jit
def snn_forward({arguments}):
    M = {units} * UNIT
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    {mask}
    {params}
    {initial}
    {load_first}
    for c in range(chunks):
        {load_ahead}
        {save}
        {load}
        {run}
        {take_ahead}
    {last_short_chunk}
    {store_final}
"""

_BACKWARD = """
@triton.jit
def backward_chunk({chunk_arguments}):
    {start}
    for k in tl.static_range(K - 1):  # the state before each step, again
        {replay}
        {keep}
    for k in tl.static_range(K - 1, -1, -1):
        {pullback}
        {add}
        {store}
    {give_back}


@triton.jit
def snn_backward({arguments}):
    part = {units} * UNIT
    M = part * GROUPS
    first = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    {mask}
    {params}
    {zero}
    for group in range(GROUPS):  # blocks of lanes that share their params
        lane = group * part + first
        {d_final}
        {last_short_chunk}
        {load_first}
        for i in range(chunks):
            c = chunks - 1 - i
            {load_ahead}
            {load}
            {run}
            {take_ahead}
        {store_d_state}
    {store_d_params}
"""


def _forward(problem, names, blocks, periods, save):
    T, K = problem.T, blocks.chunk
    save = save and T > K
    ahead = blocks.prefetch and T >= 2 * K
    masked = _masked(problem, blocks)
    x_ptrs, out_ptrs = pointers(names.xs), pointers(names.outs)
    packed = {o: d for o, d in zip(names.outs, problem.out_dtypes, strict=True) if isinstance(d, Packed)}
    at = ["at", *(f"{o}_at" for o in packed)]
    load_chunk, loaded = _load_chunk("load_chunk", names.xs, masked)

    def store(o):
        if o in packed:
            return _pack(o, packed[o].steps, masked)
        return [_store(f"{o}_ptr + at + k * M", f"{o}.to({o}_ptr.dtype.element_ty)", masked)]

    def checkpoint(c, *conditions):
        mask = [" & ".join([*masked, *conditions])] if masked or conditions else []
        where = f"({c} - 1) * M + lane"
        return [_store(f"{s}_saved_ptr + {where}", s, mask) for s in names.state if save]

    def load(c, size="K", suffix=""):
        at = f"{c} * K * M + lane"
        return [call([n + suffix for n in loaded], "load_chunk", x_ptrs, [at], masked, ["M", size])]

    def run(c, size="K", suffix=""):
        at_here = [n + suffix for n in at]
        rows = ["K", *(f"(K // {d.steps})" for d in packed.values())]
        lines = [f"{n} = {c} * {row} * M + lane" for n, row in zip(at_here, rows, strict=True)]
        groups = names.params, names.state, [n + suffix for n in loaded], out_ptrs, at_here, masked, ["M", size]
        return [*lines, call(names.state, "forward_chunk", *groups)]

    tail = checkpoint("chunks") + load("chunks", "TAIL", "_tail") + run("chunks", "TAIL", "_tail")
    text = fill(
        _FORWARD,
        chunk_arguments=[*names.params, *names.state, *loaded, *out_ptrs, *at, *masked, *_CHUNK_CONSTANTS],
        step=[call([*names.state, *names.outs], "step", names.params, names.state, at_step(names.xs))],
        store=[line for o in names.outs for line in store(o)],
        give_back=returned(names.state),
        arguments=[
            *(*pointers(names.params), *_start(problem, names), *x_ptrs, *_scalars(problem, periods)),
            *(*out_ptrs, *pointers(names.state, "_end"), *pointers(names.state if save else (), "_saved"), *_CONSTANTS),
        ],
        units=[_units(problem)],
        mask=[f"{mask} = lane < M" for mask in masked],
        params=_load_params(problem, names, periods, masked),
        initial=_initial(problem, names, masked),
        load_first=load("0") if ahead else [],
        load_ahead=[_AHEAD.format("tl.minimum(c + 1, chunks - 1)"), *load("ahead", suffix="_ahead")] if ahead else [],
        save=checkpoint("c", "(c > 0)"),
        load=[] if ahead else load("c"),
        run=run("c"),
        take_ahead=[f"{n} = {n}_ahead" for n in loaded] if ahead else [],
        last_short_chunk=tail if T % K else [],
        store_final=[_store(f"{s}_end_ptr + lane", s, masked) for s in names.state],
    )
    return "\n\n".join([load_chunk, text])


def _pack(out, steps, masked):
    """Bit k of a word is 1 where the output of step k is not 0; a chunk begins with a word."""
    return [
        f"bit = ({out} != 0).to(tl.uint{steps}) << (k % {steps})",
        f"{out}_word = bit if k % {steps} == 0 else {out}_word | bit",
        f"if k % {steps} == {steps - 1} or k == K - 1:",
        "    " + _store(f"{out}_ptr + {out}_at + (k // {steps}) * M", f"{out}_word", masked),
    ]


def _backward(problem, names, blocks, periods, wanted, live_outs, live_state):
    T, K = problem.T, blocks.chunk
    saved = T > K
    ahead = blocks.prefetch and T >= 2 * K
    masked = _masked(problem, blocks)
    d_outs, d_xs = d_of(pick(names.outs, live_outs)), d_of(pick(names.xs, wanted.xs))
    d_params, d_state = d_of(pick(names.params, wanted.params)), d_of(names.state)
    wanted_state = pick(d_state, wanted.state) if wanted.state else []
    load_chunk, loaded = _load_chunk("load_chunk_backward", (*names.xs, *d_outs), masked)
    inputs = [*names.params, *names.state, *d_params, *d_state, *loaded, *pointers(d_xs), "at", *masked]
    here = [f"{d}_here" for d in d_params]

    def load(c, size="K", suffix="", first=True):
        """Load what chunk c needs: its inputs, and the state before it (a checkpoint, or the initial state for chunk 0)."""
        states = [s + suffix for s in names.state]
        lines = []
        if first:
            mask = [" & ".join([*masked, f"({c} == 0)"])] if saved else masked
            lines += _initial(problem, names, mask, suffix)
        for s, state in zip(names.state, states, strict=True) if saved else ():
            conditions = [*masked, *([f"({c} > 0)"] if first else [])]
            masking = f", mask={' & '.join(conditions)}, other={state if first else 0.0}" if conditions else ""
            lines += [f"{state} = tl.load({s}_saved_ptr + ({c} - 1) * M + lane{masking})"]
        groups = pointers(names.xs), pointers(d_outs), [f"{c} * K * M + lane"], masked, ["M", size]
        return [*lines, call([n + suffix for n in loaded], "load_chunk_backward", *groups)]

    def run(c, size="K", suffix=""):
        at = f"at{suffix} = {c} * K * M + lane"
        given = [n + suffix if n in (*names.state, *loaded, "at") else n for n in inputs]
        return [at, call([*d_params, *d_state], "backward_chunk", given, ["M", size])]

    def zero_or(live, d):
        return f"{d} = {_load(f'{d}_end_ptr + lane', masked) if live else 'tl.zeros([BLOCK], tl.float32)'}"

    before_step = names.params, at_step(names.state), at_step(names.xs)
    text = fill(
        _BACKWARD,
        chunk_arguments=[*inputs, *_CHUNK_CONSTANTS],
        start=[f"{s}_at = ({s},)" for s in names.state],
        replay=[call([*names.state, *("_" for _ in names.outs)], "step", *before_step)],
        keep=[f"{s}_at += ({s},)" for s in names.state],
        pullback=[call([*d_state, *here, *d_xs], "pullback", *before_step, d_state, at_step(d_outs))],
        add=[f"{d} += {h}" for d, h in zip(d_params, here, strict=True)],
        store=[_store(f"{d}_ptr + at + k * M", f"{d}.to({d}_ptr.dtype.element_ty)", masked) for d in d_xs],
        give_back=returned([*d_params, *d_state]),
        arguments=[
            *(*pointers(names.params), *_start(problem, names), *pointers(names.state if saved else (), "_saved")),
            *(*pointers(names.xs), *pointers(d_outs), *pointers(pick(d_state, live_state), "_end")),
            *_scalars(problem, periods),
            *(
                *pointers(d_params),
                *pointers(wanted_state, "_start"),
                *pointers(d_xs),
                *_CONSTANTS,
                "GROUPS: tl.constexpr",
            ),
        ],
        mask=[f"{mask} = first < M" for mask in masked],  # then GROUPS is 1
        params=_load_params(problem, names, periods, masked, "first"),
        units=[_units(problem)],
        zero=[zero_or(False, d) for d in d_params],
        d_final=[zero_or(live, d) for d, live in zip(d_state, live_state, strict=True)],
        last_short_chunk=load("chunks", "TAIL", "_tail", first=False) + run("chunks", "TAIL", "_tail") if T % K else [],
        load_first=load("(chunks - 1)", first=False) if ahead else [],
        load_ahead=[_AHEAD.format("tl.maximum(c - 1, 0)"), *load("ahead", suffix="_ahead")] if ahead else [],
        load=[] if ahead else load("c"),
        run=run("c"),
        take_ahead=[f"{n} = {n}_ahead" for n in (*names.state, *loaded)] if ahead else [],
        store_d_params=[_store(f"{d}_ptr + first", d, masked and ["first < M"]) for d in d_params],
        store_d_state=[_store(f"{d}_start_ptr + lane", d, masked) for d in wanted_state],
    )
    return "\n\n".join([load_chunk, text])


_AHEAD = "ahead = {}  # loaded while chunk c is computed"
_CHUNK_CONSTANTS = ["M", "K: tl.constexpr"]

_CONSTANTS = [f"{name}: tl.constexpr" for name in ("UNIT", "K", "TAIL", "BLOCK")]


def _units(problem):
    """How often UNIT goes into the lanes of a group; in 64 bits if 32 are too few for an offset."""
    return "tl.cast(units, tl.int64)" if problem.T * problem.M >= 2**31 else "units"


def wraps(problem: Problem, periods: Periods) -> list[int]:
    """The periods that a kernel gets as an argument: powers of two, because `lane & (period - 1)` is cheap."""
    return sorted({p for p in periods if 16 <= p < problem.M and p.bit_count() == 1})


def _scalars(problem, periods):
    return ["chunks", "units", *(f"wrap{i}" for i in range(len(wraps(problem, periods))))]


def _masked(problem, blocks):
    """["mask"] if the last program has lanes beyond M, else []."""
    return ["mask"] if problem.M % blocks.lanes else []


def _load_params(problem, names, periods, masked, lane="lane"):
    lines, shared = [], wraps(problem, periods)
    for i in range(len(shared)):
        lines.append(f"at_wrap{i} = tl.max_contiguous(tl.multiple_of({lane} & wrap{i}, 16), 16)  # lane % period")
    for name, period in zip(names.params, periods, strict=True):
        if period == 1:
            lines.append(f"{name} = tl.full([BLOCK], tl.load({name}_ptr).to(tl.float32), tl.float32)")
        else:
            where = lane if period == problem.M else f"{lane} % {period}"
            where = f"at_wrap{shared.index(period)}" if period in shared else where
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
    return pointers(names.state if problem.initial is None else (), "_start")


def _load_chunk(function, names, masked):
    """(a function that loads K steps of some sequences, the names of what it returns)."""
    at = [f"{n}_at" for n in names]
    text = fill(
        LOAD_CHUNK,
        name=[function],
        arguments=[*pointers(names), "at", *masked, *_CHUNK_CONSTANTS],
        empty=[f"{n} = ()" for n in at],
        load=[f"{n}_at += ({_load(f'{n}_ptr + at + k * M', masked)}.to(tl.float32),)" for n in names],
        give_back=returned(at),
    )
    return text, at


def _load(where, masked):
    return f"tl.load({where}, mask={masked[0]}, other=0.0)" if masked else f"tl.load({where})"


def _store(where, what, mask):
    return f"tl.store({where}, {what}{f', mask={mask[0]}' if mask else ''})"
