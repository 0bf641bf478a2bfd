"""Triton source of a recurrent layer: the loop over time and the product with the weight in one kernel, both ways.

A program owns ROWS samples and all neurons of one head, as a tile [SIZE, ROWS]: SIZE is the number of neurons of a head,
rounded up to a power of two. It keeps the weight in registers for the whole sequence. Every step multiplies the weight by
the spikes of the tile, which pass through shared memory, because every warp needs all of them. That is the only exchange.

    forward    back[t] = weight^T s[t-1];  current[t] = x[t] + back[t];  state[t], s[t] = step(params, state[t-1], current[t])
    backward   d_s[t] = d_out[t] + weight d_current[t+1];  then the pullback of the step, which gives d_current[t]

The forward kernel stores current[t] for the backward kernel. So the backward kernel recomputes the states of a chunk without
any product. The other functions of the text (`step`, `pullback`) are those of `snnfuse.ops.triton_source`.

A number becomes the sum of `parts` bfloat16 numbers for the tensor cores (`split`): one part has 8 bits of mantissa, two
have 16, three have all 24 of float32. Spikes are 0 or 1, so one part holds them exactly.

`get` and `put` load and store with inline assembly. Triton gives the result of `tl.load` a layout of its own, and each step
would wait at four more barriers to change it into the layout of the product; the result of inline assembly takes the layout
that its user needs.
"""

from typing import NamedTuple

import numpy as np

from snnfuse.ops import triton_equations as equations
from snnfuse.ops.fused import Wanted
from snnfuse.ops.problem import Problem, Recurrence
from snnfuse.ops.triton_source import (
    Names,
    Periods,
    at_step,
    call,
    d_of,
    fill,
    module,
    offset,
    pick,
    pointers,
    pullback_function,
    returned,
    step_function,
)


class RecurrentBlocks(NamedTuple):
    """`size` neurons and `rows` samples a program; `warps` run it; `chunk` is K, the steps between two checkpoints."""

    size: int
    rows: int
    warps: int
    chunk: int

    @property
    def tile(self) -> tuple[int, int]:
        return self.size, self.rows

    def checkpoints(self, T: int) -> int:
        """The number of checkpoints: the state before each chunk."""
        return -(-T // self.chunk)


def forward_text(
    problem: Problem, blocks: RecurrentBlocks, periods: Periods, recurrence: Recurrence, save: bool
) -> str:
    """A module with `snn_recurrent_forward(*params, *state, s[0], *xs, weight, chunks, *outs, *final state, current,
    *checkpoints)`."""
    names = Names(problem)
    step, _ = step_function(problem, names, blocks.tile)
    forward = _forward(problem, names, blocks, periods, recurrence, save)
    return module(problem, _access(_masked(problem, blocks, recurrence)), step, forward)


def backward_text(
    problem, blocks, periods: Periods, recurrence: Recurrence, wanted: Wanted, live_outs, live_state, live_fed
):
    """A module with `snn_recurrent_backward(*params, *checkpoints, current, *other xs, *d_outs, *d_state, d_s[T], weight,
    chunks, *d_params, *d_state, d_s[0], d_current, *other d_xs)`."""
    names = Names(problem)
    step, known = step_function(problem, names, blocks.tile)
    fed_back = tuple(live or i == recurrence.feedback for i, live in enumerate(live_outs))
    inner = Wanted(wanted.params, wanted.state, (True, *wanted.xs[1:]))
    pullback = pullback_function(problem, names, blocks.tile, inner, fed_back, known)
    backward = _backward(problem, names, blocks, periods, recurrence, inner, live_outs, live_state, live_fed)
    return module(problem, _access(_masked(problem, blocks, recurrence)), step, pullback, backward)


_ACCESS = """
@triton.jit
def get({get_arguments}):
    if pointer.dtype.element_ty.primitive_bitwidth == 32:
        bits = tl.inline_asm_elementwise(
            "{load_32}", "=r,l{constraint}", [pointer.to(tl.int64){operand}], tl.int32, is_pure=True, pack=1
        )
    else:
        bits = tl.inline_asm_elementwise(
            "{load_16}", "=h,l{constraint}", [pointer.to(tl.int64){operand}], tl.int16, is_pure=True, pack=1
        )
    return bits.to(pointer.dtype.element_ty, bitcast=True)


@triton.jit
def put({put_arguments}):
    width: tl.constexpr = pointer.dtype.element_ty.primitive_bitwidth
    if width == 32:
        tl.inline_asm_elementwise(
            "{store_32}", "=r,l,r{constraint}", [pointer.to(tl.int64), value.to(tl.int32, bitcast=True){operand}],
            tl.int32, is_pure=False, pack=1,
        )
    elif width == 16:
        tl.inline_asm_elementwise(
            "{store_16}", "=r,l,h{constraint}", [pointer.to(tl.int64), value.to(tl.int16, bitcast=True){operand}],
            tl.int32, is_pure=False, pack=1,
        )
    elif width < 16:
        tl.inline_asm_elementwise(
            "{store_8}", "=r,l,h{constraint}", [pointer.to(tl.int64), value.to(tl.int16){operand}],
            tl.int32, is_pure=False, pack=1,
        )
    else:
        tl.store(pointer, value{mask})
"""


def _access(masked):
    """`get` and `put`, with a mask if there is one."""

    def load(bits):
        one = f"ld.global.nc.b{bits} $0, [$1];"
        return f"{{ .reg .pred p; setp.ne.b32 p, $2, 0; mov.b{bits} $0, 0; @p {one} }}" if masked else one

    def store(bits):
        one = f"st.global.b{bits} [$1], $2;"
        one = f"{{ .reg .pred p; setp.ne.b32 p, $3, 0; @p {one} }}" if masked else one
        return f"{one} mov.b32 $0, 0;"

    holes = {f"load_{bits}": [load(bits)] for bits in (16, 32)} | {
        f"store_{bits}": [store(bits)] for bits in (8, 16, 32)
    }
    return fill(
        _ACCESS,
        get_arguments=["pointer", *masked],
        put_arguments=["pointer", "value", *masked],
        constraint=[",r" if masked else ""],
        operand=[", mask.to(tl.int32)" if masked else ""],
        mask=[", mask=mask" if masked else ""],
        **holes,
    )


_PRODUCT = """
@triton.jit
def split(value, PARTS: tl.constexpr):
    parts = ()
    for _ in tl.static_range(PARTS):
        part = value.to(tl.bfloat16)
        parts += (part,)
        value -= part.to(tl.float32)
    return parts


@triton.jit
def product(weight_at, value_at, SIZE: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr):
    total = tl.zeros([SIZE, ROWS], tl.float32)
    for order in tl.static_range(PARTS - 1, -1, -1):  # the smallest products first; those smaller yet are left out
        for i in tl.static_range(order + 1):
            if order - i < len(value_at):
                total = tl.dot(weight_at[i], value_at[order - i], total)
    return total


@triton.jit
def load_weight(weight_ptr, to, source, HEAD: tl.constexpr, PARTS: tl.constexpr, HEADS: tl.constexpr, TURN: tl.constexpr):
    weight_at = ()
    for i in tl.static_range(PARTS):
        first = (i * HEADS + tl.program_id(1)) * HEAD * HEAD
        {mask}
        weight_at += ({get_weight},)
    return weight_at
"""

_TILE = """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[None, :]
    neuron = tl.arange(0, SIZE)[:, None]
    lane = row * (HEAD * HEADS) + tl.program_id(1) * HEAD + neuron
    {mask}
    {params}
    weight_at = load_weight(weight_ptr, neuron, tl.arange(0, SIZE)[None, :], HEAD, PARTS, HEADS, {transposed})
"""

_LOAD_CHUNK = """
@triton.jit
def {name}({arguments}):
    {empty}
    for k in tl.static_range(K):  # all loads before any use: they are in flight together
        {load}
    {give_back}
"""

_FORWARD = """
@triton.jit
def forward_chunk({chunk_arguments}):
    for k in tl.static_range(K):
        current = {x}_at[k].to(tl.float32) + back
        {step}
        {store}
        back = product(weight_at, split({fed}, 1), SIZE, ROWS, PARTS)
    {give_back}


@triton.jit
def snn_recurrent_forward({arguments}):
    {tile}
    {initial}
    {start}
    {load_first}
    for c in range(chunks):
        {load_ahead}
        {save}
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
        {d_fed}
        {pullback}
        {add}
        {store}
        back = product(weight_at, split({d_current}, PARTS), SIZE, ROWS, PARTS)
    {give_back}


@triton.jit
def snn_recurrent_backward({arguments}):
    {tile}
    {zero}
    {d_final}
    {last_short_chunk}
    {load_first}
    for i in range(chunks):
        c = chunks - 1 - i
        {load_ahead}
        {run}
        {take_ahead}
    {store_d_params}
    {store_d_state}
"""

_CHUNK_CONSTANTS = [f"{name}: tl.constexpr" for name in ("M", "K", "SIZE", "ROWS", "PARTS")]
_CONSTANTS = [f"{name}: tl.constexpr" for name in ("M", "K", "TAIL", "SIZE", "ROWS", "HEAD", "HEADS", "PARTS")]
_SHAPE = ["SIZE", "ROWS", "PARTS"]


def _masked(problem, blocks, recurrence):
    """["mask"] if some tile has lanes that do not exist, else []."""
    rows = problem.M // problem.lane_shape[-1]
    return ["mask"] if problem.lane_shape[-1] // recurrence.heads != blocks.size or rows % blocks.rows else []


def _product(masked):
    at = "weight_ptr + first + (to * HEAD + source if TURN else source * HEAD + to)"
    mask = [f"{m} = (to < HEAD) & (source < HEAD)" for m in masked]
    return fill(_PRODUCT, mask=mask, get_weight=[_get(at, masked)])


def _tile(problem, names, periods, masked, transposed):
    lines = _params(problem, names, periods, masked)
    mask = [f"{m} = (neuron < HEAD) & (row < M // (HEAD * HEADS))" for m in masked]
    text = fill(_TILE, mask=mask, params=lines, transposed=[str(transposed)])
    return [line.removeprefix("    ") for line in text.splitlines()]


def _params(problem, names, periods, masked):
    lines = []
    for name, period in zip(names.params, periods, strict=True):
        if period == 1:
            lines.append(f"{name} = tl.full([SIZE, ROWS], tl.load({name}_ptr).to(tl.float32), tl.float32)")
        else:
            where = "lane" if period == problem.M else f"lane % {period}"
            lines.append(f"{name} = {_get(f'{name}_ptr + {where}', masked)}.to(tl.float32)")
    return lines


def _get(where, masked):
    return f"get({', '.join([where, *masked])})"


def _put(where, what, masked):
    return f"put({', '.join([where, what, *masked])})"


def _load_chunk(function, names, masked):
    """(a function that loads K steps of some sequences, the names of what it returns). A value is cast when it is used."""
    at = [f"{n}_at" for n in names]
    text = fill(
        _LOAD_CHUNK,
        name=[function],
        arguments=[*pointers(names), "at", *masked, "M: tl.constexpr", "K: tl.constexpr"],
        empty=[f"{n} = ()" for n in at],
        load=[f"{n}_at += ({_get(f'{n}_ptr + at + k * M', masked)},)" for n in names],
        give_back=returned(at),
    )
    return text, at


def _cast(names):
    return [f"{n}_at[k].to(tl.float32)" for n in names]


def _forward(problem, names, blocks, periods, recurrence, save):
    T, K = problem.T, blocks.chunk
    masked = _masked(problem, blocks, recurrence)
    x_ptrs, out_ptrs, saved = pointers(names.xs), pointers(names.outs), ["current_ptr"] if save else []
    load_chunk, loaded = _load_chunk("load_chunk", names.xs, masked)
    inputs = [*names.params, *names.state, "back", *loaded, "weight_at", *out_ptrs, *saved, "at", *masked]
    stored = [(o, o) for o in names.outs] + [("current", "current")] * save

    def load(c, size="K", suffix=""):
        at = f"{offset(c, 'K * M', problem)} + lane"
        return [call([n + suffix for n in loaded], "load_chunk", x_ptrs, [at], masked, ["M", size])]

    def run(c, size="K", suffix=""):
        given = [n + suffix if n in (*loaded, "at") else n for n in inputs]
        at = f"at{suffix} = {offset(c, 'K * M', problem)} + lane"
        return [at, call([*names.state, "back"], "forward_chunk", given, ["M", size], _SHAPE)]

    def checkpoint(c):
        return [_put(f"{s}_saved_ptr + {offset(c, 'M', problem)} + lane", s, masked) for s in names.state if save]

    if problem.initial is None:
        initial = [f"{s} = {_get(f'{s}_start_ptr + lane', masked)}" for s in names.state]
    else:
        values = zip(names.state, problem.initial, strict=True)
        initial = [f"{s} = tl.full([SIZE, ROWS], {equations.literal(np.float32(v))}, tl.float32)" for s, v in values]
    if recurrence.starts:  # any float32 numbers, in three parts; for spikes, the same bits as after a step
        start = [f"fed_at = split({_get('fed_start_ptr + lane', masked)}, 3)"]
        start += [
            f"back = product(weight_at, (fed_at[{i}],), {', '.join(_SHAPE)}){' + back' * (i < 2)}" for i in (2, 1, 0)
        ]
    else:
        start = ["back = tl.zeros([SIZE, ROWS], tl.float32)"]
    text = fill(
        _FORWARD,
        chunk_arguments=[*inputs, *_CHUNK_CONSTANTS],
        x=[names.xs[0]],
        step=[call([*names.state, *names.outs], "step", names.params, names.state, ["current"], _cast(names.xs[1:]))],
        store=[_put(f"{p}_ptr + at + k * M", f"{n}.to({p}_ptr.dtype.element_ty)", masked) for p, n in stored],
        fed=[names.outs[recurrence.feedback]],
        give_back=returned([*names.state, "back"]),
        arguments=[
            *(*pointers(names.params), *pointers(names.state if problem.initial is None else (), "_start")),
            *(*(["fed_start_ptr"] if recurrence.starts else []), *x_ptrs, "weight_ptr", "chunks"),
            *(*out_ptrs, *pointers(names.state, "_end"), *saved, *pointers(names.state if save else (), "_saved")),
            *_CONSTANTS,
        ],
        tile=_tile(problem, names, periods, masked, transposed=False),
        initial=initial,
        start=start,
        load_first=load("0"),
        load_ahead=["ahead = tl.minimum(c + 1, chunks - 1)", *load("ahead", suffix="_ahead")],
        save=checkpoint("c"),
        run=run("c"),
        take_ahead=[f"{n} = {n}_ahead" for n in loaded],
        last_short_chunk=checkpoint("chunks") + load("chunks", "TAIL", "_tail") + run("chunks", "TAIL", "_tail")
        if T % K
        else [],
        store_final=[_put(f"{s}_end_ptr + lane", s, masked) for s in names.state],
    )
    return "\n\n".join([_product(masked), load_chunk, text])


def _backward(problem, names, blocks, periods, recurrence, wanted, live_outs, live_state, live_fed):
    T, K = problem.T, blocks.chunk
    masked = _masked(problem, blocks, recurrence)
    sequences = ["current", *names.xs[1:]]
    d_outs, d_xs = d_of(pick(names.outs, live_outs)), d_of(pick(names.xs, wanted.xs))
    fed = f"d_{names.outs[recurrence.feedback]}"
    d_params, d_state = d_of(pick(names.params, wanted.params)), d_of(names.state)
    wanted_state = pick(d_state, wanted.state) if wanted.state else []
    load_chunk, loaded = _load_chunk("load_chunk_backward", (*sequences, *d_outs), masked)
    inputs = [
        *names.params,
        *names.state,
        *d_params,
        *d_state,
        "back",
        *loaded,
        "weight_at",
        *pointers(d_xs),
        "at",
        *masked,
    ]
    here = [f"{d}_here" for d in d_params]
    given_d = [d for i, d in enumerate(d_of(names.outs)) if live_outs[i] or i == recurrence.feedback]
    values = [fed if d == fed else f"{d}_at[k].to(tl.float32)" for d in given_d]
    results = [*d_params, *d_state, "back"]

    def load(c, size="K", suffix=""):
        at = f"{offset(c, 'M', problem)} + lane"
        states = [f"{s}{suffix} = {_get(f'{s}_saved_ptr + {at}', masked)}" for s in names.state]
        groups = pointers(sequences), pointers(d_outs), [f"{offset(c, 'K * M', problem)} + lane"], masked, ["M", size]
        return [*states, call([n + suffix for n in loaded], "load_chunk_backward", *groups)]

    def run(c, size="K", suffix=""):
        at = f"at{suffix} = {offset(c, 'K * M', problem)} + lane"
        given = [n + suffix if n in (*names.state, *loaded, "at") else n for n in inputs]
        return [at, call(results, "backward_chunk", given, ["M", size], _SHAPE)]

    def final(live, pointer):
        return _get(f"{pointer} + lane", masked) if live else "tl.zeros([SIZE, ROWS], tl.float32)"

    before_step = names.params, at_step(names.state), _cast(sequences)
    d_current = d_xs[0]
    text = fill(
        _BACKWARD,
        chunk_arguments=[*inputs, *_CHUNK_CONSTANTS],
        start=[f"{s}_at = ({s},)" for s in names.state],
        replay=[call([*names.state, *("_" for _ in names.outs)], "step", *before_step)],
        keep=[f"{s}_at += ({s},)" for s in names.state],
        d_fed=[f"{fed} = {fed}_at[k].to(tl.float32) + back" if fed in d_outs else f"{fed} = back"],
        pullback=[call([*d_state, *here, *d_xs], "pullback", *before_step, d_state, values)],
        add=[f"{d} += {h}" for d, h in zip(d_params, here, strict=True)],
        store=[_put(f"{d}_ptr + at + k * M", f"{d}.to({d}_ptr.dtype.element_ty)", masked) for d in d_xs],
        d_current=[f"tl.where(mask, {d_current}, 0.0)" if masked else d_current],
        give_back=returned(results),
        arguments=[
            *(*pointers(names.params), *pointers(names.state, "_saved"), *pointers(sequences), *pointers(d_outs)),
            *(*pointers(pick(d_state, live_state), "_end"), *(["d_fed_end_ptr"] if live_fed else [])),
            *("weight_ptr", "chunks", *pointers(d_params), *pointers(wanted_state, "_start")),
            *(*(["d_fed_start_ptr"] if recurrence.starts else []), *pointers(d_xs), *_CONSTANTS),
        ],
        tile=_tile(problem, names, periods, masked, transposed=True),
        zero=[f"{d} = tl.zeros([SIZE, ROWS], tl.float32)" for d in d_params],
        d_final=[
            *(f"{d} = {final(live, f'{d}_end_ptr')}" for d, live in zip(d_state, live_state, strict=True)),
            f"back = {final(live_fed, 'd_fed_end_ptr')}",
        ],
        last_short_chunk=load("chunks", "TAIL", "_tail") + run("chunks", "TAIL", "_tail") if T % K else [],
        load_first=load("(chunks - 1)"),
        load_ahead=["ahead = tl.maximum(c - 1, 0)", *load("ahead", suffix="_ahead")],
        run=run("c"),
        take_ahead=[f"{n} = {n}_ahead" for n in (*names.state, *loaded)],
        store_d_params=[_put(f"{d}_ptr + lane", d, masked) for d in d_params],
        store_d_state=[
            *(_put(f"{d}_start_ptr + lane", d, masked) for d in wanted_state),
            *([_put("d_fed_start_ptr + lane", "back", masked)] if recurrence.starts else []),
        ],
    )
    return "\n\n".join([_product(masked), load_chunk, text])
