"""Triton source that both kernels of a recurrent layer share: loads and stores, the product with the weight, and how the
programs of a split head meet.

A number becomes the sum of `parts` bfloat16 numbers for the tensor cores (`split`): one part has 8 bits of mantissa, two
have 16, three have all 24 of float32. Spikes are 0 or 1, so one part holds them exactly.

`get` and `put` load and store with inline assembly. Triton gives the result of `tl.load` a layout of its own, and each step
would wait at four more barriers to change it into the layout of the product; the result of inline assembly takes the layout
that its user needs.
"""

from snnfuse.ops.triton_text import call, fill

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


def access(masked):
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


_SPLIT = """
@triton.jit
def split(value, PARTS: tl.constexpr):
    parts = ()
    for i in tl.static_range(PARTS):
        part = value.to(tl.bfloat16)
        parts += (part,)
        if i < PARTS - 1:
            value -= part.to(tl.float32)
    return parts
"""

_PRODUCT = """
@triton.jit
def product(weight_at, value_at, SIZE: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr):
    total = tl.zeros([SIZE, ROWS], tl.float32)
    for order in tl.static_range(PARTS - 1, -1, -1):  # the smallest products first; those smaller yet are left out
        for i in tl.static_range(order + 1):
            if order - i < len(value_at):
                total = tl.dot(weight_at[i], value_at[order - i], total)
    return total


@triton.jit
def load_weight(
    weight_ptr, head, to, source, HEAD: tl.constexpr, PARTS: tl.constexpr, HEADS: tl.constexpr, TURN: tl.constexpr
):
    weight_at = ()
    for i in tl.static_range(PARTS):
        first = (i * HEADS + head) * HEAD * HEAD
        {mask}
        weight_at += ({get_weight},)
    return weight_at
"""

_GROUP = """
@triton.jit
def product(
    weight, value_at, SIZE: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, STACK: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    total = tl.zeros([SIZE * STACK, ROWS], tl.float32)
    for i in tl.static_range(len(value_at) - 1, -1, -1):  # the smallest products first
        total = tl.dot(weight, value_at[i], total)
    return {total}


@triton.jit
def load_weight(weight_ptr, head, to, source, HEAD: tl.constexpr, STACK: tl.constexpr, TURN: tl.constexpr):
    weight_ptr += head * HEAD * HEAD * STACK
    {mask}
    return {get_weight}


@triton.jit
def arrive(counter_ptr):
    tl.debug_barrier()
    tl.atomic_add(counter_ptr, 1, sem="release")


@triton.jit
def wait(counter_ptr, count):  # a difference, because a counter may pass 2^31; an error, if nothing comes for a minute
    tl.inline_asm_elementwise(
        "{{ .reg .pred p; .reg .b32 v, n; mov.b32 n, 0; again: ld.acquire.gpu.global.b32 v, [$1]; sub.s32 v, v, $2; "
        "add.s32 n, n, 1; setp.gt.s32 p, n, 0x8000000; @p trap; setp.lt.s32 p, v, 0; @p bra again; mov.b32 $0, v; }}",
        "=r,l,r,~{{memory}}", [counter_ptr.to(tl.int64), count], tl.int32, is_pure=False, pack=1,
    )


@triton.jit
def everyone({arguments}):
    return {load}
"""


def lane_mask(problem, blocks, recurrence):
    """["mask"] if some tile has lanes that do not exist, else []."""
    rows = problem.M // problem.lane_shape[-1]
    return ["mask"] if problem.lane_shape[-1] // recurrence.heads % blocks.size or rows % blocks.rows else []


def head_mask(problem, blocks, recurrence):
    """["head_mask"] if some tile [WIDTH, ROWS] of a whole head has lanes that do not exist, else []."""
    head, rows = problem.lane_shape[-1] // recurrence.heads, problem.M // problem.lane_shape[-1]
    return ["head_mask"] if head & (head - 1) or head < 16 or rows % blocks.rows else []


def functions(problem, blocks, recurrence):
    """The functions that multiply by the weight and, for a split head, exchange."""
    masked = head_mask(problem, blocks, recurrence)
    mask = ["mask"] * len(masked)
    if blocks.programs == 1:
        at = "weight_ptr + first + (to * HEAD + source if TURN else source * HEAD + to)"
        exist = [f"{m} = (to < HEAD) & (source < HEAD)" for m in mask]
        return _SPLIT + "\n\n" + fill(_PRODUCT, mask=exist, get_weight=[get(at, mask)])
    at = "weight_ptr + (to * HEAD + source if TURN else source * (HEAD * STACK) + to)"
    return (
        _SPLIT
        + "\n\n"
        + fill(
            _GROUP,
            total=["tl.sum(tl.reshape(total, [SIZE, STACK, ROWS]), 1)" if stack(recurrence) > 1 else "total"],
            mask=[f"{m} = (to < HEAD * STACK) & (source < HEAD)" for m in mask],
            get_weight=[load(at, mask)],
            arguments=["pointer", *masked],
            load=[load("pointer", masked, ', cache_modifier=".cg"')],  # what other programs stored is not in L1
        )
    )


def stack(recurrence):
    """How many rows of a split head's weight belong to one neuron: the parts, and zeros to make it a power of two."""
    return 1 << (recurrence.parts - 1).bit_length()


def exchange(pointer, masked, store, ahead):
    """The lines that store the results of a step, the first of which is at `pointer`, and load that of the whole head.

    `ahead` loads what the next chunk needs, while this program waits.
    """
    meet = ["arrive(meet_ptr)", *store[1:], *ahead, "count += PROGRAMS", "wait(meet_ptr, count)"]
    return [store[0], *meet, call(["whole"], "everyone", [f"{pointer} + every_at + k * M", *masked])]


def get(where, masked):
    return f"get({', '.join([where, *masked])})"


def load(where, masked, more=""):
    return f"tl.load({where}{f', mask={masked[0]}, other=0' if masked else ''}{more})"


def put(where, what, masked):
    return f"put({', '.join([where, what, *masked])})"
