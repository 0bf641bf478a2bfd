"""Recurrent layers in Triton: the kernels of `snnfuse.ops.recurrent_source`, their gradient, and when they can run.

Stored from forward to backward: the current x[t] + s[t-1] @ weight in float32 (in place of the first x), the other xs, the
output that feeds back, and one state every K steps. The gradient of the weight is one matrix product over T and B, outside
of the kernels: d_weight = sum over t of s[t-1]^T d_current[t].
"""

import math
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend import core as jex
from jax.sharding import NamedSharding, PartitionSpec

from snnfuse.ops import fused, recurrent_product, recurrent_source, triton, triton_source
from snnfuse.ops.device import compute_capability, multiprocessors
from snnfuse.ops.fused import Wanted
from snnfuse.ops.packing import Packed, pack
from snnfuse.ops.partition import like, on_lanes, periodic, varying
from snnfuse.ops.problem import Problem, Recurrence
from snnfuse.ops.recurrent_tile import RecurrentBlocks


def why_not(problem: Problem, recurrence: Recurrence) -> str | None:
    """The reason why the kernels cannot run this call on this device, or None if they can."""
    if (why := triton.why_not_here()) is not None:
        return why
    if 0 < (capability := compute_capability()) < 8.0:
        return f"it needs compute capability 8.0, the device has {capability}"
    if (why := why_not_kernels(problem, recurrence)) is not None:
        return why
    if blocks(problem, recurrence).programs > 1 and not 9.0 <= capability < 11.0:
        return f"a head of more than {_most(recurrence)} neurons needs compute capability 9 or 10, the device has {capability}"
    return None


def why_not_kernels(problem: Problem, recurrence: Recurrence) -> str | None:
    """None if kernels can be generated for this call. Triton need not be installed."""
    if (why := triton.why_not_dtypes(problem)) is not None:
        return why
    sizes, head = blocks(problem, recurrence), problem.lane_shape[-1] // recurrence.heads
    if sizes.programs > 1 and sizes.slots == 0:
        return (
            f"a head of {head} neurons is split over {sizes.programs} programs, which must run at once; the device has "
            f"{multiprocessors()} multiprocessors"
        )
    if head > (most := 512 if recurrence.parts == 3 else 1024):
        return f"it runs at most {most} neurons a head with precision={recurrence.precision!r}; got {head}"
    tile = sizes.tile
    if (why := problem.why_not_lanewise(tile) or triton_source.why_not(problem, tile)) is not None:
        return why
    jaxpr = problem.step_jaxpr(tile).jaxpr
    if not _values(jaxpr, jaxpr.outvars[problem.num_state + recurrence.feedback]) <= {0.0, 1.0}:
        return (
            f"neuron {type(problem.step.neuron).__name__}: the output that feeds back is not always 0 or 1, and only such "
            "an output is exact in bfloat16"
        )
    return None


def _values(jaxpr, var):
    """The values that a variable may have, as far as selects between constants tell; {nan} if they do not."""
    if isinstance(var, jex.Literal):
        return {float(var.val)}
    eqn = next((e for e in jaxpr.eqns if var in e.outvars), None)
    name = None if eqn is None else eqn.primitive.name
    if name in ("broadcast_in_dim", "copy"):
        return _values(jaxpr, eqn.invars[0])
    if name == "convert_element_type" and jnp.issubdtype(eqn.params["new_dtype"], jnp.floating):
        return {0.0, 1.0} if eqn.invars[0].aval.dtype == jnp.bool_ else _values(jaxpr, eqn.invars[0])
    if name == "select_n":
        return set().union(*(_values(jaxpr, v) for v in eqn.invars[1:]))
    if name == "mul":
        return {a * b for a in _values(jaxpr, eqn.invars[0]) for b in _values(jaxpr, eqn.invars[1])}
    return {math.nan}


def blocks(problem: Problem, recurrence: Recurrence) -> RecurrentBlocks:
    """Tiles of 8 samples, the fewest that the tensor cores take: few samples a program leave few numbers on the path of a step.

    LIF on an H100, T = 256, B = 256, bfloat16, us a step forward + backward. H = 128: (8 rows, 8 warps, chunks of 4)
    0.65 + 0.59, 4 warps 0.61 + 0.58, 16 warps 1.02 + 0.96, chunks of 8 0.53 + 0.63; 16 rows 0.81 + 0.89. H = 256: 8 warps
    1.17 + 1.28, 16 warps 1.27 + 1.53, chunks of 8 1.21 + 3.27 (registers spill).
    """
    size = max(16, 1 << (problem.lane_shape[-1] // recurrence.heads - 1).bit_length())
    if size > _most(recurrence):
        return _split_blocks(problem, recurrence)
    crowded = size == 256 or recurrence.parts == 3 and size == 128
    chunk = 4 if problem.num_state * (2 if crowded else 1) <= 3 else 2
    return RecurrentBlocks(size, 8, min(8, size // 16), min(chunk, problem.T))


def _most(recurrence):
    """The most neurons of a head whose weight fits into the registers of one program."""
    return 256 if recurrence.parts == 1 else 128


def _split_blocks(problem, recurrence):
    """At least 64 rows of the weight (neurons times stacked parts) and 16 samples a program, which wgmma needs.

    Tried on an H200, and slower: 8 warps in bfloat16; fewer samples a program, which take more rounds; a product whose terms are
    split over the warps, without wgmma; spikes that travel as bits.
    """
    head, rows = problem.lane_shape[-1] // recurrence.heads, problem.M // problem.lane_shape[-1]
    one = recurrence.parts == 1
    size = (64 if one or head > 512 else 128) // recurrent_product.stack(recurrence)
    programs = -(-head // size)
    slots = multiprocessors() // programs
    wanted = -(-rows * recurrence.heads // max(slots, 1))  # samples a program, if all groups run at once
    rows = min(32 if one else 16, max(16, 1 << (wanted - 1).bit_length()))
    chunk = 2 if problem.num_state <= 2 else 1
    narrow = (
        head <= 512 or problem.x_dtypes[0] == jnp.bfloat16
    )  # else the registers of 4 warps spill in the backward kernel
    return RecurrentBlocks(size, rows, 4 if one and narrow else 8, min(chunk, problem.T), programs, slots)


def source(problem: Problem, recurrence: Recurrence) -> str:
    """The text of both kernels that are compiled for this call, with every gradient."""
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in problem.param_shapes]
    periods = tuple(jax.eval_shape(lambda p: periodic(p, problem.lane_shape), s).shape[0] for s in shapes)
    sizes, every = blocks(problem, recurrence), lambda n: (True,) * n
    states = every(problem.num_state)
    wanted = Wanted(every(len(shapes)), states if problem.initial is None else (), every(len(problem.x_dtypes)))
    live = problem.differentiable, states, True
    return "\n\n".join(
        [
            recurrent_source.forward_text(problem, sizes, periods, recurrence, save=True),
            recurrent_source.backward_text(problem, sizes, periods, recurrence, wanted, *live),
        ]
    )


@dataclass(frozen=True)
class RecurrentKernels:
    """The two kernels over flat lanes, as `fused.Kernels` has them, with the bfloat16 parts of the weight."""

    problem: Problem
    recurrence: Recurrence
    blocks: RecurrentBlocks
    whole_last_axis = True

    def forward(self, weight, params, state, fed, xs, *, save):
        """(outs [T, M], final state [M], current [T, M] and checkpoints [_, M], neither unless `save`)."""
        problem, blocks = self.problem, self.blocks
        periods = tuple(p.shape[0] for p in params)
        results = self._call(
            "snn_recurrent_forward",
            recurrent_source.forward_text(problem, blocks, periods, self.recurrence, save),
            (*params, *state, *fed, *xs, weight),
            [
                *(problem.out_struct(d, problem.M) for d in problem.out_dtypes),
                *[self._float(problem.M)] * problem.num_state,
                *[self._float(problem.T, problem.M)] * save,
                *[self._float(blocks.checkpoints(problem.T), problem.M)] * (problem.num_state * save),
            ],
        )
        return fused.split(results, len(problem.out_dtypes), problem.num_state, int(save))

    def backward(self, weight, params, checkpoints, d_outs, d_state, d_fed, xs, *, wanted: Wanted, periods):
        """(d_params, float32 [M] each; d_state [M]; d_fed [M]; d_xs [T, M]). xs[0] is the current."""
        problem = self.problem
        live_outs, live_state = (tuple(d is not None for d in group) for group in (d_outs, d_state))
        live_fed = d_fed[0] is not None
        arrays = (*params, *checkpoints, *xs, *d_outs, *d_state, *d_fed, weight)
        lanes = self._float(problem.M)
        # d_current in bfloat16 is what the products with it round it to, if the weight has one part
        narrow = self.recurrence.parts == 1 and problem.x_dtypes[0] == jnp.bfloat16
        dtypes = (jnp.bfloat16 if narrow else jnp.float32, *problem.x_dtypes[1:])
        sizes = sum(wanted.params), sum(wanted.state), int(self.recurrence.starts)
        results = self._call(
            "snn_recurrent_backward",
            recurrent_source.backward_text(
                problem,
                self.blocks,
                tuple(p.shape[0] for p in params),
                self.recurrence,
                wanted,
                live_outs,
                live_state,
                live_fed,
            ),
            [a for a in arrays if a is not None],
            [lanes] * sum(sizes)
            + [
                jax.ShapeDtypeStruct((problem.T, problem.M), d)
                for d, want in zip(dtypes, wanted.xs, strict=True)
                if want
            ],
        )
        d_params, d_state, d_fed, d_xs = fused.split(results, *sizes)
        return _put(d_params, wanted.params), _put(d_state, wanted.state), d_fed, _put(d_xs, wanted.xs)

    def _float(self, *shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    def _call(self, name, text, args, out_shape):
        T, M, width, heads = self.problem.T, self.problem.M, self.problem.lane_shape[-1], self.recurrence.heads
        size, rows, warps, K, programs, slots = self.blocks
        constants = dict(M=M, K=K, TAIL=T % K, SIZE=size, ROWS=rows, HEAD=width // heads, HEADS=heads)
        constants["PARTS"] = self.recurrence.parts
        grid, zeroed = (-(-M // width // rows), heads), ()
        if programs > 1:
            groups = grid[0] * heads
            grid, zeroed = (programs, min(groups, slots)), (len(out_shape),)
            out_shape = [*out_shape, jax.ShapeDtypeStruct((32 * grid[1],), jnp.int32)]  # where programs meet
            constants |= dict(
                WIDTH=1 << (width // heads - 1).bit_length(), STACK=recurrent_product.stack(self.recurrence)
            )
            constants |= dict(PROGRAMS=programs, GROUPS=groups, SLOTS=grid[1])
        results = triton.triton_call(name, text, (*args, T // K), out_shape, grid, warps, constants, zeroed)
        return results[:-1] if zeroed else results


def _put(values, wanted):
    values = iter(values)
    return tuple(next(values) if want else None for want in wanted)


def run(problem: Problem, recurrence: Recurrence, params, state, fed, xs, weight):
    """(outs, final state, the output that feeds back at the last step). `fed` is () or (s[0],)."""
    dtypes = tuple(jnp.dtype(bool) if isinstance(d, Packed) else d for d in problem.out_dtypes)
    unpacked = replace(problem, out_dtypes=dtypes)
    kernels = RecurrentKernels(unpacked, recurrence, blocks(problem, recurrence))
    outs, state, fed = _run(kernels, *varying((params, state, fed, xs, weight)))
    pairs = zip(outs, problem.out_dtypes, strict=True)
    return tuple(pack(o, d.steps) if isinstance(d, Packed) else o for o, d in pairs), state, fed


@partial(jax.jit, static_argnums=0)
@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(kernels, params, state, fed, xs, weight):
    return _forward(kernels, params, state, fed, xs, weight, save=False)[0]


def _forward(kernels, params, state, fed, xs, weight, save):
    shared = (_parts(kernels, weight, axis=3),)
    results = on_lanes("forward", kernels, params, state, fed, xs, shared=shared, save=save)
    outs, final, current, checkpoints = results
    last = outs[kernels.recurrence.feedback][-1].astype(jnp.float32)
    return (outs, final, last), (current, checkpoints)


def _run_forward(kernels, *args):
    values = jax.tree.map(lambda a: a.value, args)
    params, state, fed, xs, weight = values
    wanted = jax.tree.map(lambda a: a.perturbed, args)
    results, (current, checkpoints) = _forward(kernels, *values, save=True)
    spikes = results[0][kernels.recurrence.feedback]
    kept = params, state, fed, (*current, *xs[1:]), weight, checkpoints, spikes
    return results, (kept, Wanted(wanted[0], wanted[1], wanted[3]), _Static(wanted[4]))


@jax.tree_util.register_static
@dataclass(frozen=True)
class _Static:
    value: bool


def _run_backward(kernels, residuals, cotangents):
    (params, state, fed, xs, weight, checkpoints, spikes), wanted, weight_wanted = residuals
    d_outs, d_state, d_last = jax.tree.map(
        lambda d: None if isinstance(d, SymbolicZero) else d, cotangents, is_leaf=lambda d: isinstance(d, SymbolicZero)
    )
    d_outs = tuple(d if live else None for d, live in zip(d_outs, kernels.problem.differentiable, strict=True))
    shared = (_parts(kernels, weight, axis=2),)
    inner = replace(wanted, xs=(True, *wanted.xs[1:]))
    groups = checkpoints, d_outs, d_state, (d_last,), xs
    d_params, d_state, d_fed, d_xs = on_lanes("backward", kernels, params, *groups, shared=shared, wanted=inner)
    d_weight = None
    if weight_wanted.value:
        d_weight = _weight_gradient(kernels.recurrence, spikes, fed, d_xs[0], weight)
    dtypes = kernels.problem.x_dtypes
    given = (params, d_params), (state, d_state), (fed, d_fed)
    d_params, d_state, d_fed = (
        tuple(None if d is None else like(d, p) for p, d in zip(*group, strict=True)) for group in given
    )
    d_xs = tuple(d.astype(dtype) if want else None for d, dtype, want in zip(d_xs, dtypes, wanted.xs, strict=True))
    return d_params, d_state, d_fed, d_xs, d_weight


_run.__wrapped__.defvjp(_run_forward, _run_backward, symbolic_zeros=True)


def split(value, parts: int) -> list[jax.Array]:
    """`parts` bfloat16 arrays whose sum is the value: with 3 parts exactly that of float32."""
    value, found = value.astype(jnp.float32), []
    for _ in range(parts):
        part = jax.lax.reduce_precision(value, 8, 7)  # XLA would remove a cast there and back
        found.append(part.astype(jnp.bfloat16))
        value = value - part
    return found


def _parts(kernels, weight, axis):
    """The parts of the weight [heads, H, H]: [parts, heads, H, H], or for split heads beside each other along the new `axis`."""
    parts = split(weight, kernels.recurrence.parts)
    if kernels.blocks.programs == 1:
        return jnp.stack(parts)
    zeros = recurrent_product.stack(kernels.recurrence) - len(parts)
    return jnp.stack(parts + [jnp.zeros_like(parts[0])] * zeros, axis)


def _weight_gradient(recurrence, spikes, fed, d_current, weight):
    heads, size, _ = weight.shape
    mesh = jax.typeof(d_current).sharding.mesh
    whole = (
        NamedSharding(mesh, PartitionSpec()) if mesh.explicit_axes else None
    )  # the sum over samples is on every device

    def product(s, d, **options):
        s, d = (a.reshape(*a.shape[:-1], heads, size) for a in (s, d))
        others = tuple(range(s.ndim - 2))
        dims = ((others, others), ((s.ndim - 2,), (s.ndim - 2,)))
        return jax.lax.dot_general(s, d, dims, preferred_element_type=jnp.float32, out_sharding=whole, **options)

    before = spikes[:-1].astype(jnp.bfloat16)
    found = sum(product(before, part) for part in split(d_current[1:], recurrence.parts))
    for s in fed:
        found += product(s, d_current[0].astype(jnp.float32), precision="highest")
    return like(found, weight)
