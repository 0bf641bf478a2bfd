"""The fused kernels in Pallas, lowered through Mosaic GPU: for compute capability 9.0 and later.

Lanes are seen as rows of 256, [T, M / 256, 256], because a tile of an asynchronous copy has at most 256 elements a side.
A program is one warpgroup and owns a few rows. The copy engine streams its chunks of K steps through shared memory,
several at a time, while the state stays in registers.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from snnfuse.ops import fused
from snnfuse.ops.blocks import MosaicBlocks, mosaic_blocks, mosaic_candidates
from snnfuse.ops.device import compute_capability, platform
from snnfuse.ops.packing import Packed, pack
from snnfuse.ops.problem import Problem

WIDTH = 256


# The primitives that Mosaic GPU of JAX 0.11.2 can lower.
_LOWERED = frozenset(
    """abs add and atan2 broadcast_in_dim clamp convert_element_type copy cos div eq erf exp exp2 ge gt le log
    log2 logistic lt max min mul ne neg not or rem round rsqrt select_n sign sin sqrt square sub tanh xor""".split()
)


class Mosaic(fused.Fused):
    """The implementation "mosaic"."""

    def why_not(self, problem: Problem) -> str | None:
        if platform() != "gpu":
            return f"it needs a GPU, the device is a {platform()}"
        if (capability := compute_capability()) < 9.0:
            return f"Mosaic GPU needs compute capability 9.0, the device has {capability}"
        if jax.__version_info__ < (0, 11, 2):
            return f"it needs JAX 0.11.2 for its Mosaic GPU; this is {jax.__version__}"
        if problem.dtype != jnp.float32:
            return f"it computes in float32; xs is {problem.dtype}"
        if (why := problem.why_not_lanewise((mosaic_blocks(problem).rows, WIDTH))) is not None:
            return why
        names = {e.primitive.name for e in problem.full_pullback_jaxpr((1, WIDTH)).jaxpr.eqns}
        if missing := names - _LOWERED:
            return f"neuron {type(problem.step.neuron).__name__}: Mosaic GPU has no {sorted(missing)}"
        return None

    def blocks(self, problem: Problem) -> MosaicBlocks:
        return mosaic_blocks(problem)

    def candidates(self, problem: Problem) -> list[MosaicBlocks]:
        return mosaic_candidates(problem)

    def kernels(self, problem: Problem, blocks: MosaicBlocks) -> fused.Kernels:
        return MosaicKernels(problem, blocks)


MOSAIC = Mosaic()


@dataclass(frozen=True)
class MosaicKernels:
    """`fused.Kernels` for one problem."""

    problem: Problem
    blocks: MosaicBlocks

    def forward(self, params, state, xs, *, save):
        problem, (rows, K, _), T = self.problem, self.blocks, self.problem.T
        checkpointed = problem.num_state if save and T > K else 0
        # the kernel stores floating dtypes; an integer or packed output is made from float32 afterwards
        out_dtypes = [d if f else jnp.float32 for d, f in zip(problem.out_dtypes, problem.differentiable, strict=True)]
        out_types = [jax.ShapeDtypeStruct((T, self._height, WIDTH), d) for d in out_dtypes]

        def body(*refs):
            param_refs, state_refs, x_refs, out_refs, final_refs, checkpoint_refs = fused.split(
                refs, len(params), len(state), len(xs), len(problem.out_dtypes), problem.num_state
            )
            i = lax.axis_index("n")
            mine = pl.ds(i * rows, rows)
            p = self._load_params(param_refs, mine)

            def chunk(indices, *refs):
                *refs, s = refs
                x_tiles, out_tiles, checkpoint_tiles = fused.split(refs, len(xs), len(out_refs))
                for tile, leaf in zip(checkpoint_tiles, s, strict=bool(checkpointed)):
                    tile[0] = leaf
                x = [tuple(self._load(tile.at[k]) for tile in x_tiles) for k in range(K)]
                s, outs = fused.chunk_forward(problem, p, s, x)
                for k, step in enumerate(outs):
                    for tile, leaf in zip(out_tiles, step, strict=True):
                        tile[k] = leaf.astype(tile.dtype)
                return s

            s = self._pipeline(
                chunk,
                [self._tile(K, lambda c: (c, i, 0))] * len(xs),
                [self._tile(K, lambda c: (c, i, 0))] * len(out_refs)
                + [self._tile(1, lambda c: (c, i, 0))] * len(checkpoint_refs),
                self._initial(state_refs, mine),
            )(*x_refs, *out_refs, *checkpoint_refs)
            for ref, leaf in zip(final_refs, s, strict=True):
                ref[mine] = leaf

        results = self._call(
            body,
            "snn_forward",
            params,
            (*state, *xs),
            out_types
            + [self._float(self._height, WIDTH)] * problem.num_state
            + [self._float(self.blocks.checkpoints(T), self._height, WIDTH)] * checkpointed,
        )
        outs, *rest = fused.results_of_forward(problem, results)
        pairs = zip(outs, problem.out_dtypes, strict=True)
        return tuple(pack(o, d.steps) if isinstance(d, Packed) else o.astype(d) for o, d in pairs), *rest

    def backward(self, params, state, checkpoints, xs, d_outs, d_state, *, wanted, periods):
        problem, (rows, K, _), T = self.problem, self.blocks, self.problem.T
        live_outs = tuple(d is not None for d in d_outs)
        live_state = tuple(d is not None for d in d_state)
        pullback = problem.pullback_jaxpr((rows, WIDTH), wanted.params, wanted.xs, live_outs)
        compact = lambda leaves: tuple(leaf for leaf in leaves if leaf is not None)
        inputs = (state, checkpoints, xs, compact(d_outs), compact(d_state))

        def body(*refs):
            param_refs, refs = refs[: len(params)], refs[len(params) :]
            *in_refs, d_param_refs, d_state_refs, d_x_refs = fused.split(
                refs, *map(len, inputs), sum(wanted.params), sum(wanted.state)
            )
            state_refs, checkpoint_refs, x_refs, d_out_refs, d_final_refs = in_refs
            i = lax.axis_index("n")
            mine = pl.ds(i * rows, rows)
            p = self._load_params(param_refs, mine)
            first = () if checkpoint_refs else self._initial(state_refs, mine)

            def chunk(indices, *refs):
                *refs, (d_p, d_s) = refs
                checkpoint_tiles, x_tiles, d_out_tiles, d_x_tiles = fused.split(
                    refs, len(checkpoint_refs), len(x_refs), len(d_out_refs)
                )
                s = tuple(self._load(tile.at[0]) for tile in checkpoint_tiles) or first
                x = [tuple(self._load(tile.at[k]) for tile in x_tiles) for k in range(K)]
                d_out = [tuple(self._load(tile.at[k]) for tile in d_out_tiles) for k in range(K)]
                d_p, d_s, d_x = fused.chunk_backward(problem, pullback, p, s, x, d_out, d_p, d_s)
                for k, step in enumerate(d_x):
                    for tile, leaf in zip(d_x_tiles, step, strict=True):
                        tile[k] = leaf.astype(tile.dtype)
                return d_p, d_s

            C = T // K
            late = self._tile(K, lambda c: (C - 1 - c, i, 0))
            d_final = iter(d_final_refs)
            zero = self._full(0.0)
            carry = (
                (zero,) * len(d_param_refs),
                tuple(self._load_once(next(d_final), mine) if live else zero for live in live_state),
            )
            d_p, d_s = self._pipeline(
                chunk,
                [self._tile(1, lambda c: (C - 1 - c, i, 0))] * len(checkpoint_refs)
                + [late] * (len(x_refs) + len(d_out_refs)),
                [late] * len(d_x_refs),
                carry,
            )(*checkpoint_refs, *x_refs, *d_out_refs, *d_x_refs)
            d_s = [leaf for leaf, want in zip(d_s, wanted.state, strict=bool(wanted.state)) if want]
            for ref, leaf in zip((*d_param_refs, *d_state_refs), (*d_p, *d_s), strict=True):
                ref[mine] = leaf

        rows_of = lambda a: jax.ShapeDtypeStruct((*a.shape[:-1], self._height, WIDTH), a.dtype)
        out_types = [rows_of(a) for a in fused.shapes_of_backward(problem, xs, wanted)]
        return fused.results_of_backward(self._call(body, "snn_backward", params, sum(inputs, ()), out_types), wanted)

    @property
    def _height(self):
        """Rows of the padded lanes: a multiple of the rows of one program."""
        return pl.cdiv(self.problem.M, WIDTH * self.blocks.rows) * self.blocks.rows

    def _call(self, body, name, params, args, out_types):
        M, padded = self.problem.M, self._height * WIDTH
        # a scalar stays a scalar; any other parameter is repeated over the lanes, because this kernel cannot gather
        params = [p if p.shape == (1,) and M > 1 else jnp.tile(p, M // p.shape[0]) for p in params]
        rows_of = lambda a: jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, padded - M)]).reshape(*a.shape[:-1], -1, WIDTH)
        args = [p if p.shape == (1,) and M > 1 else rows_of(p.astype(jnp.float32)) for p in params] + [
            a if a.shape[-1] == WIDTH and a.shape[-2:-1] == (self._height,) else rows_of(a) for a in args
        ]
        body.__name__ = name
        results = plgpu.kernel(
            body,
            out_type=out_types,
            grid=(self._height // self.blocks.rows,),
            grid_names=("n",),
            compiler_params=plgpu.CompilerParams(),
        )(*args)
        lanes_of = lambda a: a.reshape(*a.shape[:-2], padded)[..., :M]
        return [lanes_of(a) for a in results]

    def _pipeline(self, chunk, in_specs, out_specs, carry):
        C = self.problem.T // self.blocks.chunk
        return plgpu.emit_pipeline(
            chunk,
            grid=(C,),
            in_specs=in_specs,
            out_specs=out_specs,
            max_concurrent_steps=min(self.blocks.stages, C),
            init_carry=carry,
        )

    def _tile(self, steps, index_map):
        return plgpu.BlockSpec((steps, self.blocks.rows, WIDTH), index_map)

    def _layout(self):
        shape = (self.blocks.rows, WIDTH)
        return plgpu.Layout.WG_STRIDED(shape, vec_size=min(4, self.blocks.rows * WIDTH // 128))

    def _load(self, ref):
        return plgpu.load(ref, layout=self._layout(), optimized=False).astype(jnp.float32)

    def _load_once(self, ref, mine):
        """Load a first or last state. In a `shard_map` a load is typed as varying; the product with one gives it the type of the carry."""
        return self._load(ref.at[mine]) * 1.0

    def _full(self, value):
        return plgpu.layout_cast(jnp.full((self.blocks.rows, WIDTH), value, jnp.float32), self._layout())

    def _initial(self, state_refs, mine):
        if self.problem.initial is None:
            return tuple(self._load_once(ref, mine) for ref in state_refs)
        return tuple(map(self._full, self.problem.initial))

    def _load_params(self, refs, mine):
        load = lambda ref: self._full(ref[0].astype(jnp.float32)) if ref.shape == (1,) else self._load(ref.at[mine])
        return tuple(map(load, refs))

    def _float(self, *shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)
