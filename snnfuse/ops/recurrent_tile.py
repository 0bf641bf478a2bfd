"""Text that the forward and the backward kernel of a recurrent layer share: a program's tile, its arguments, and loads of a chunk.

`snnfuse.ops.recurrent_source` says what a tile is, and how a wide head is split over a group of programs.
"""

from typing import NamedTuple

from snnfuse.ops.recurrent_product import get, head_mask, lane_mask
from snnfuse.ops.triton_text import LOAD_CHUNK, fill, offset, pointers, returned


class RecurrentBlocks(NamedTuple):
    """`size` neurons and `rows` samples a program; `warps` run it; `chunk` is K, the steps between two checkpoints.

    `programs` share a head; if there are several, up to `slots` such groups run at once.
    """

    size: int
    rows: int
    warps: int
    chunk: int
    programs: int = 1
    slots: int = 1

    @property
    def tile(self) -> tuple[int, int]:
        return self.size, self.rows

    def checkpoints(self, T: int) -> int:
        """The number of checkpoints: the state before each chunk."""
        return -(-T // self.chunk)


_TILE = """
{place}
row = block * ROWS + tl.arange(0, ROWS)[None, :]
lane = row * (HEAD * HEADS) + head * HEAD + neuron
{mask}
{params}
{weight}
"""


def constants(*names):
    return [f"{name}: tl.constexpr" for name in names]


def shape(blocks):
    """The names of the constants that a step needs."""
    return ["SIZE", "ROWS", "PARTS", *(["STACK", "PROGRAMS"] if blocks.programs > 1 else [])]


def tile(problem, names, blocks, periods, recurrence, transposed):
    masked, exist = lane_mask(problem, blocks, recurrence), "(row < M // (HEAD * HEADS))"
    mask = [f"{m} = (neuron < HEAD) & {exist}" for m in masked]
    if blocks.programs == 1:
        place = ["block, head = tl.program_id(0), tl.program_id(1)", "neuron = tl.arange(0, SIZE)[:, None]"]
        source = "tl.arange(0, SIZE)[None, :]"
        weight = f"weight_at = load_weight(weight_ptr, head, neuron, {source}, HEAD, PARTS, HEADS, {transposed})"
    else:
        place = [
            "block, head = group // HEADS, group % HEADS",
            "neuron = tl.program_id(0) * SIZE + tl.arange(0, SIZE)[:, None]",
            "source = tl.arange(0, WIDTH)[:, None]",
        ]
        mask += ["every = row * (HEAD * HEADS) + head * HEAD + source"]
        mask += [f"{m} = (source < HEAD) & {exist}" for m in head_mask(problem, blocks, recurrence)]
        to = "(tl.program_id(0) * (SIZE * STACK) + tl.arange(0, SIZE * STACK))[:, None]"
        across = "tl.arange(0, WIDTH)[None, :]"
        weight = f"weight_at = load_weight(weight_ptr, head, {to}, {across}, HEAD, STACK, {transposed})"
    return fill(
        _TILE, place=place, mask=mask, params=_params(problem, names, periods, masked), weight=[weight]
    ).splitlines()


def body(blocks, text):
    """The body of a kernel. If a head is split, it runs for one group after the other."""
    if blocks.programs == 1:
        return text.splitlines()
    loop = ["count = 0", "meet_ptr += tl.program_id(1) * 32", "for group in range(tl.program_id(1), GROUPS, SLOTS):"]
    return [*loop, *("    " + line for line in text.splitlines())]


def group_arguments(problem, blocks, recurrence):
    """The further arguments of a chunk if the head is split. The first is the count that a program waits for."""
    more = ["count", "meet_ptr", "ahead", "lane", "every_at", *head_mask(problem, blocks, recurrence)]
    return more if blocks.programs > 1 else []


def at(problem, blocks, c, suffix):
    at = offset(c, "K * M", problem)
    return [f"at{suffix} = {at} + lane"] + [f"every_at{suffix} = {at} + every"] * (blocks.programs > 1)


def kernel_constants(blocks):
    split = blocks.programs > 1
    more = ["WIDTH", "STACK", "PROGRAMS", "GROUPS", "SLOTS"] if split else []
    names = ["M", "K", "TAIL", "SIZE", "ROWS", "HEAD", "HEADS", "PARTS", *more]
    return ["meet_ptr"] * split + constants(*names)


def _params(problem, names, periods, masked):
    lines = []
    for name, period in zip(names.params, periods, strict=True):
        if period == 1:
            lines.append(f"{name} = tl.full([SIZE, ROWS], tl.load({name}_ptr).to(tl.float32), tl.float32)")
        else:
            where = "lane" if period == problem.M else f"lane % {period}"
            lines.append(f"{name} = {get(f'{name}_ptr + {where}', masked)}.to(tl.float32)")
    return lines


def load_chunk(function, names, masked):
    """(a function that loads K steps of some sequences, the names of what it returns). A value is cast when it is used."""
    at = [f"{n}_at" for n in names]
    text = fill(
        LOAD_CHUNK,
        name=[function],
        arguments=[*pointers(names), "at", *masked, "M: tl.constexpr", "K: tl.constexpr"],
        empty=[f"{n} = ()" for n in at],
        load=[f"{n}_at += ({get(f'{n}_ptr + at + k * M', masked)},)" for n in names],
        give_back=returned(at),
    )
    return text, at


def cast(names):
    return [f"{n}_at[k].to(tl.float32)" for n in names]
