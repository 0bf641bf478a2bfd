"""Triton source of a recurrent layer: the loop over time and the product with the weight in one kernel, both ways.

A program owns ROWS samples and SIZE neurons of one head, as a tile [SIZE, ROWS]. It keeps its part of the weight, [SIZE,
WIDTH], for the whole sequence: WIDTH is the number of neurons of a head, rounded up to a power of two.

If a head fits, one program has all of it (SIZE = WIDTH). Every step multiplies the weight by the spikes of the tile, which
pass through shared memory, because every warp needs all of them. That is the only exchange.

A wider head is split over PROGRAMS programs, a *group*. Each step they store their spikes (backward: d_current), `meet`, and
load those of the whole group. They meet at a counter in memory: each program adds 1, and waits until all have. The counter
only grows, so nothing resets it. A program waits for others, so all programs of a launch must run at once: there are at
most as many as the device has multiprocessors. SLOTS groups run at once, and take one block of samples of one head after
the other.

    forward    back[t] = weight^T s[t-1];  current[t] = x[t] + back[t];  state[t], s[t] = step(params, state[t-1], current[t])
    backward   d_s[t] = d_out[t] + weight d_current[t+1];  then the pullback of the step, which gives d_current[t]

The forward kernel stores current[t] for the backward kernel. So the backward kernel recomputes the states of a chunk without
any product. The other functions of the text are those of `snnfuse.ops.triton_text` (`step`, `pullback`) and of
`snnfuse.ops.recurrent_product` (`product`, `everyone`, `get`, `put`).
"""

import numpy as np

from snnfuse.ops import recurrent_tile as tiles
from snnfuse.ops import triton_equations as equations
from snnfuse.ops.fused import Wanted
from snnfuse.ops.problem import Problem, Recurrence
from snnfuse.ops.recurrent_product import access, exchange, functions, get, lane_mask, put
from snnfuse.ops.recurrent_tile import RecurrentBlocks
from snnfuse.ops.triton_text import (
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


def forward_text(
    problem: Problem, blocks: RecurrentBlocks, periods: Periods, recurrence: Recurrence, save: bool
) -> str:
    """A module with `snn_recurrent_forward(*params, *state, s[0], *xs, weight, chunks, *outs, *final state, current,
    *checkpoints)`."""
    names = Names(problem)
    step, _ = step_function(problem, names, blocks.tile)
    forward = _forward(problem, names, blocks, periods, recurrence, save)
    return module(problem, access(lane_mask(problem, blocks, recurrence)), step, forward)


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
    return module(problem, access(lane_mask(problem, blocks, recurrence)), step, pullback, backward)


_FORWARD = """
@triton.jit
def forward_chunk({chunk_arguments}):
    for k in tl.static_range(K):
        current = {x}_at[k].to(tl.float32) + back
        {step}
        {store}
        {exchange}
        back = product(weight_at, split({fed}, 1), {shape})
    {give_back}


@triton.jit
def snn_recurrent_forward({arguments}):
    {body}
"""

_FORWARD_BODY = """
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
        {exchange}
        back = product(weight_at, split({d_current}, PARTS), {shape})
    {give_back}


@triton.jit
def snn_recurrent_backward({arguments}):
    {body}
"""

_BACKWARD_BODY = """
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


def _forward(problem, names, blocks, periods, recurrence, save):
    T, K = problem.T, blocks.chunk
    masked = lane_mask(problem, blocks, recurrence)
    x_ptrs, out_ptrs, saved = pointers(names.xs), pointers(names.outs), ["current_ptr"] if save else []
    load_chunk, loaded = tiles.load_chunk("load_chunk", names.xs, masked)
    group = tiles.group_arguments(problem, blocks, recurrence)
    no_ahead = ["ahead = 0"] * bool(group)
    own = ["at", "every_at", *loaded]  # what a last short chunk has under a name of its own
    inputs = [*names.params, *names.state, "back", *loaded, "weight_at", *out_ptrs, *saved, "at", *masked, *group]
    inputs += x_ptrs if group else []
    fed = names.outs[recurrence.feedback]
    stored = [fed, *(o for o in names.outs if o != fed)] + ["current"] * save
    store = [put(f"{n}_ptr + at + k * M", f"{n}.to({n}_ptr.dtype.element_ty)", masked) for n in stored]
    carried = [*names.state, "back", *group[:1], *loaded * bool(group)]

    def load(c, size="K", suffix=""):
        at = f"{offset(c, 'K * M', problem)} + lane"
        return [call([n + suffix for n in loaded], "load_chunk", x_ptrs, [at], masked, ["M", size])]

    def run(c, size="K", suffix=""):
        given, results = ([n + suffix if n in own else n for n in group] for group in (inputs, carried))
        at = tiles.at(problem, blocks, c, suffix)
        return [*at, call(results, "forward_chunk", given, ["M", size], tiles.shape(blocks))]

    def checkpoint(c):
        return [put(f"{s}_saved_ptr + {offset(c, 'M', problem)} + lane", s, masked) for s in names.state if save]

    if problem.initial is None:
        initial = [f"{s} = {get(f'{s}_start_ptr + lane', masked)}" for s in names.state]
    else:
        values = zip(names.state, problem.initial, strict=True)
        initial = [f"{s} = tl.full([SIZE, ROWS], {equations.literal(np.float32(v))}, tl.float32)" for s, v in values]
    start, shape = ["back = tl.zeros([SIZE, ROWS], tl.float32)"], ", ".join(tiles.shape(blocks))
    if recurrence.starts and group:  # any float32 numbers, in three parts; for spikes, the same bits as after a step
        start += [
            call(["rest"], "everyone", ["fed_start_ptr + every", *group[5:]]),
            "for _ in range(3):  # a loop, so that shared memory has room for one part",
            "    part = rest.to(tl.bfloat16)",
            f"    back += product(weight_at, (part,), {shape})",
            "    rest -= part.to(tl.float32)",
        ]
    elif recurrence.starts:
        start = [f"fed_at = split({get('fed_start_ptr + lane', masked)}, 3)"]
        start += [f"back = product(weight_at, (fed_at[{i}],), {shape}){' + back' * (i < 2)}" for i in (2, 1, 0)]
    body = fill(
        _FORWARD_BODY,
        tile=tiles.tile(problem, names, blocks, periods, recurrence, transposed=False),
        initial=initial,
        start=start,
        load_first=load("0"),
        load_ahead=["ahead = tl.minimum(c + 1, chunks - 1)", *([] if group else load("ahead", suffix="_ahead"))],
        save=checkpoint("c"),
        run=run("c"),
        take_ahead=[f"{n} = {n}_ahead" for n in loaded if not group],
        last_short_chunk=[
            *checkpoint("chunks"),
            *load("chunks", "TAIL", "_tail"),
            *no_ahead,
            *run("chunks", "TAIL", "_tail"),
        ]
        if T % K
        else [],
        store_final=[put(f"{s}_end_ptr + lane", s, masked) for s in names.state],
    )
    text = fill(
        _FORWARD,
        chunk_arguments=[*inputs, *tiles.constants("M", "K", *tiles.shape(blocks))],
        x=[names.xs[0]],
        step=[
            call([*names.state, *names.outs], "step", names.params, names.state, ["current"], tiles.cast(names.xs[1:]))
        ],
        store=[] if group else store,
        exchange=exchange(f"{fed}_ptr", group[5:], store, ["if k == K - 1:", "    " + load("ahead")[0]])
        if group
        else [],
        fed=["whole" if group else fed],
        shape=tiles.shape(blocks),
        give_back=returned(carried),
        arguments=[
            *(*pointers(names.params), *pointers(names.state if problem.initial is None else (), "_start")),
            *(*(["fed_start_ptr"] if recurrence.starts else []), *x_ptrs, "weight_ptr", "chunks"),
            *(*out_ptrs, *pointers(names.state, "_end"), *saved, *pointers(names.state if save else (), "_saved")),
            *tiles.kernel_constants(blocks),
        ],
        body=tiles.body(blocks, body),
    )
    return "\n\n".join([functions(problem, blocks, recurrence), load_chunk, text])


def _backward(problem, names, blocks, periods, recurrence, wanted, live_outs, live_state, live_fed):
    T, K = problem.T, blocks.chunk
    masked = lane_mask(problem, blocks, recurrence)
    sequences = ["current", *names.xs[1:]]
    d_outs, d_xs = d_of(pick(names.outs, live_outs)), d_of(pick(names.xs, wanted.xs))
    fed = f"d_{names.outs[recurrence.feedback]}"
    d_params, d_state = d_of(pick(names.params, wanted.params)), d_of(names.state)
    wanted_state = pick(d_state, wanted.state) if wanted.state else []
    load_chunk, loaded = tiles.load_chunk("load_chunk_backward", (*sequences, *d_outs), masked)
    group = tiles.group_arguments(problem, blocks, recurrence)
    no_ahead = ["ahead = 0"] * bool(group)
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
        *group,
        *([*pointers(names.state, "_saved"), *pointers(sequences), *pointers(d_outs)] if group else []),
    ]
    own = ["at", "every_at", *names.state, *loaded]
    here = [f"{d}_here" for d in d_params]
    given_d = [d for i, d in enumerate(d_of(names.outs)) if live_outs[i] or i == recurrence.feedback]
    values = [fed if d == fed else f"{d}_at[k].to(tl.float32)" for d in given_d]
    results = [*d_params, *d_state, "back", *group[:1], *(*names.state, *loaded) * bool(group)]

    def load(c, size="K", suffix=""):
        at = f"{offset(c, 'M', problem)} + lane"
        states = [f"{s}{suffix} = {get(f'{s}_saved_ptr + {at}', masked)}" for s in names.state]
        groups = pointers(sequences), pointers(d_outs), [f"{offset(c, 'K * M', problem)} + lane"], masked, ["M", size]
        return [*states, call([n + suffix for n in loaded], "load_chunk_backward", *groups)]

    def run(c, size="K", suffix=""):
        at = tiles.at(problem, blocks, c, suffix)
        given, to = ([n + suffix if n in own else n for n in group] for group in (inputs, results))
        return [*at, call(to, "backward_chunk", given, ["M", size], tiles.shape(blocks))]

    def final(live, pointer):
        return get(f"{pointer} + lane", masked) if live else "tl.zeros([SIZE, ROWS], tl.float32)"

    before_step = names.params, at_step(names.state), tiles.cast(sequences)
    d_current = d_xs[0]
    ahead = ["if k == 0:", *("    " + line for line in load("ahead"))]
    store = [put(f"{d}_ptr + at + k * M", f"{d}.to({d}_ptr.dtype.element_ty)", masked) for d in d_xs]
    if group:
        multiplied = "whole"
    else:
        multiplied = f"tl.where(mask, {d_current}, 0.0)" if masked else d_current
    body = fill(
        _BACKWARD_BODY,
        tile=tiles.tile(problem, names, blocks, periods, recurrence, transposed=True),
        zero=[f"{d} = tl.zeros([SIZE, ROWS], tl.float32)" for d in d_params],
        d_final=[
            *(f"{d} = {final(live, f'{d}_end_ptr')}" for d, live in zip(d_state, live_state, strict=True)),
            f"back = {final(live_fed, 'd_fed_end_ptr')}",
        ],
        last_short_chunk=[*load("chunks", "TAIL", "_tail"), *no_ahead, *run("chunks", "TAIL", "_tail")]
        if T % K
        else [],
        load_first=load("(chunks - 1)"),
        load_ahead=["ahead = tl.maximum(c - 1, 0)", *([] if group else load("ahead", suffix="_ahead"))],
        run=run("c"),
        take_ahead=[f"{n} = {n}_ahead" for n in (*names.state, *loaded) if not group],
        store_d_params=[put(f"{d}_ptr + lane", d, masked) for d in d_params],
        store_d_state=[
            *(put(f"{d}_start_ptr + lane", d, masked) for d in wanted_state),
            *([put("d_fed_start_ptr + lane", "back", masked)] if recurrence.starts else []),
        ],
    )
    text = fill(
        _BACKWARD,
        chunk_arguments=[*inputs, *tiles.constants("M", "K", *tiles.shape(blocks))],
        start=[f"{s}_at = ({s},)" for s in names.state],
        replay=[call([*names.state, *("_" for _ in names.outs)], "step", *before_step)],
        keep=[f"{s}_at += ({s},)" for s in names.state],
        d_fed=[f"{fed} = {fed}_at[k].to(tl.float32) + back" if fed in d_outs else f"{fed} = back"],
        pullback=[call([*d_state, *here, *d_xs], "pullback", *before_step, d_state, values)],
        add=[f"{d} += {h}" for d, h in zip(d_params, here, strict=True)],
        store=[] if group else store,
        exchange=exchange(f"{d_current}_ptr", group[5:], store, ahead) if group else [],
        d_current=[multiplied],
        shape=tiles.shape(blocks),
        give_back=returned(results),
        arguments=[
            *(*pointers(names.params), *pointers(names.state, "_saved"), *pointers(sequences), *pointers(d_outs)),
            *(*pointers(pick(d_state, live_state), "_end"), *(["d_fed_end_ptr"] if live_fed else [])),
            *("weight_ptr", "chunks", *pointers(d_params), *pointers(wanted_state, "_start")),
            *(["d_fed_start_ptr"] if recurrence.starts else []),
            *(*pointers(d_xs), *tiles.kernel_constants(blocks)),
        ],
        body=tiles.body(blocks, body),
    )
    return "\n\n".join([functions(problem, blocks, recurrence), load_chunk, text])
