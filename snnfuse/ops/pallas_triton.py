"""The fused kernels in Pallas, lowered through Triton, or run by the interpreter of Pallas."""

import importlib
import math
import sys
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from snnfuse.ops import fused
from snnfuse.ops.blocks import Blocks, interpreter_blocks, param_groups, triton_blocks, triton_candidates
from snnfuse.ops.device import platform
from snnfuse.ops.packing import Packed
from snnfuse.ops.problem import Problem

LOWERING = "jax.experimental.pallas.triton"  # deprecated: a later JAX will not have it


class Pallas(fused.Fused):
    """The implementation "pallas"."""

    def why_not(self, problem: Problem) -> str | None:
        if platform() != "gpu":
            return f"it needs a GPU, the device is a {platform()}; `interpret` runs the same kernels anywhere, slowly"
        if (why := _why_no_lowering()) is not None:
            return why
        return _why_not_kernels(problem)

    def blocks(self, problem: Problem) -> Blocks:
        return triton_blocks(problem)

    def candidates(self, problem: Problem) -> list[Blocks]:
        return triton_candidates(problem)

    def kernels(self, problem: Problem, blocks: Blocks) -> fused.Kernels:
        return PallasKernels(problem, blocks)


class Interpret(fused.Fused):
    """The implementation "interpret": the same kernels on any device, slowly, for tests and debugging."""

    def why_not(self, problem: Problem) -> str | None:
        return _why_not_kernels(problem)

    def blocks(self, problem: Problem) -> Blocks:
        return interpreter_blocks(problem)

    def candidates(self, problem: Problem) -> list[Blocks]:
        return triton_candidates(problem)

    def kernels(self, problem: Problem, blocks: Blocks) -> fused.Kernels:
        return PallasKernels(problem, blocks, interpret=True)


PALLAS, INTERPRET = Pallas(), Interpret()


def _why_no_lowering() -> str | None:
    try:
        importlib.import_module(LOWERING)
    except ImportError as e:
        return f"JAX {jax.__version__} has no Triton lowering of Pallas ({e}); 'mosaic' and 'triton' do not need it"
    return None


def _why_not_kernels(problem: Problem) -> str | None:
    if problem.dtype != jnp.float32:
        return f"it computes in float32; xs is {problem.dtype}"
    if (
        any(not isinstance(d, Packed) and jnp.dtype(d).itemsize == 1 for d in problem.out_dtypes)
        and problem.T * problem.M >= 2**31
    ):
        return "an 8-bit output of 2^31 or more elements overflows the 32-bit offsets of the Pallas Triton lowering"
    # first on 32 lanes: the block sizes depend on the traced step, and tracing may fail
    return problem.why_not_lanewise((32,)) or problem.why_not_lanewise((triton_blocks(problem).lanes,))


@dataclass(frozen=True)
class PallasKernels:
    """`fused.Kernels` for one problem."""

    problem: Problem
    blocks: Blocks
    interpret: bool = False

    def forward(self, params, state, xs, *, save):
        problem, K, T = self.problem, self.blocks.chunk, self.problem.T
        num_checkpoints = problem.num_state if save and T > K else 0

        def kernel(*refs):
            param_refs, state_refs, x_refs, out_refs, final_refs, checkpoint_refs = fused.split(
                refs, len(params), len(state), len(xs), len(problem.out_dtypes), problem.num_state
            )
            mask = self._mask()
            p = self._load_params(param_refs, mask)

            def load(c, k=K):
                return self._load_steps(x_refs, c * K, k, mask)

            def chunk(c, s, x):
                for ref, leaf in zip(checkpoint_refs, s, strict=bool(num_checkpoints)):
                    self._store(ref.at[jnp.maximum(c - 1, 0)], leaf, mask=self._where(c > 0, mask))
                s, outs = fused.chunk_forward(problem, p, s, x)
                self._store_outs(out_refs, c, outs, mask)
                return s

            C = T // K
            s = self._loop(C, lambda i: i, load, chunk, self._initial(state_refs, mask))
            if T % K:
                s = chunk(jnp.int32(C), s, load(jnp.int32(C), T % K))
            for ref, leaf in zip(final_refs, s, strict=True):
                self._store(ref.at[:], leaf, mask=mask)

        results = self._call(
            kernel,
            "snn_forward",
            (*params, *state, *xs),
            len(params),
            [problem.out_struct(d, problem.M) for d in problem.out_dtypes]
            + [self._float(problem.M)] * problem.num_state
            + [self._float(self.blocks.checkpoints(T), problem.M)] * num_checkpoints,
        )
        return fused.results_of_forward(problem, results)

    def backward(self, params, state, checkpoints, xs, d_outs, d_state, *, wanted, periods):
        problem, K, T = self.problem, self.blocks.chunk, self.problem.T
        live_outs = tuple(d is not None for d in d_outs)
        live_state = tuple(d is not None for d in d_state)
        pullback = problem.pullback_jaxpr((self.blocks.lanes,), wanted.params, wanted.xs, live_outs)
        inputs = (params, state, checkpoints, xs, fused.given(d_outs), fused.given(d_state))
        groups = param_groups(problem, self.blocks, (*(p.shape[0] for p in params), *periods) if periods else ())

        def kernel(*refs):
            *in_refs, d_param_refs, d_state_refs, d_x_refs = fused.split(
                refs, *map(len, inputs), sum(wanted.params), sum(wanted.state)
            )
            param_refs, state_refs, checkpoint_refs, x_refs, d_out_refs, d_final_refs = in_refs
            mask = self._mask()
            p = self._load_params(param_refs, mask)
            zero = jnp.zeros((self.blocks.lanes,), problem.dtype)

            def block(g, d_p):
                """Block g of this program: adds its gradients of the params to d_p."""
                at = lambda refs: [_Group(ref, groups, g) for ref in refs] if groups > 1 else refs
                starts, saved, x, d_out, d_final, d_start, d_x = map(
                    at, (state_refs, checkpoint_refs, x_refs, d_out_refs, d_final_refs, d_state_refs, d_x_refs)
                )

                def load(c, k=K):
                    s = self._initial(starts, self._where(c == 0, mask) if saved else mask)
                    if saved:
                        later = self._where(c > 0, mask)
                        before = (self._load(ref.at[jnp.maximum(c - 1, 0)], later) for ref in saved)
                        s = tuple(jnp.where(c > 0, b, a) for a, b in zip(s, before, strict=True))
                    return s, self._load_steps(x, c * K, k, mask), self._load_steps(d_out, c * K, k, mask)

                def chunk(c, carry, loaded):
                    d_p, d_s, steps = fused.chunk_backward(problem, pullback, p, *loaded, *carry)
                    self._store_steps(d_x, c * K, steps, mask)
                    return d_p, d_s

                finals = iter(d_final)
                d_s = tuple(self._load(next(finals).at[:], mask) if live else zero for live in live_state)
                carry, C = (d_p, d_s), T // K
                if T % K:
                    carry = chunk(jnp.int32(C), carry, load(jnp.int32(C), T % K))
                d_p, d_s = self._loop(C, lambda i: C - 1 - i, load, chunk, carry)
                d_s = [leaf for leaf, want in zip(d_s, wanted.state, strict=bool(wanted.state)) if want]
                for ref, leaf in zip(d_start, d_s, strict=True):
                    self._store(ref.at[:], leaf, mask=mask)
                return d_p

            d_p = (zero,) * len(d_param_refs)
            d_p = lax.fori_loop(0, groups, block, d_p) if groups > 1 else block(0, d_p)
            for ref, leaf in zip(d_param_refs, d_p, strict=True):
                self._store(ref.at[:], leaf, mask=mask)

        out_shape = fused.shapes_of_backward(problem, xs, wanted, groups)
        reused = fused.reused(problem, inputs, out_shape)
        results = self._call(kernel, "snn_backward", sum(inputs, ()), len(params), out_shape, reused, groups)
        return fused.results_of_backward(results, wanted)

    def _float(self, *shape):
        return jax.ShapeDtypeStruct(shape, self.problem.dtype)

    def _call(self, kernel, name, args, num_params, out_shape, reused=None, groups=1):
        """Run the kernel. M is divided into `groups` equal parts; program i runs block i of each part, one after the other."""
        M, lanes = self.problem.M, self.blocks.lanes
        varies = jax.typeof(args[-1]).manual_axis_type
        if self.interpret and varies.varying:
            raise NotImplementedError(
                "interpret: the interpreter of Pallas does not run inside of shard_map with check_vma=True; give it "
                'check_vma=False, or take implementation="scan"'
            )
        out_shape = [jax.ShapeDtypeStruct(a.shape, a.dtype, manual_axis_type=varies) for a in out_shape]
        whole = lambda a: pl.BlockSpec(a.shape, lambda i: (0,) * len(a.shape))
        block = lambda a: pl.BlockSpec((*a.shape[:-1], lanes), lambda i: (0,) * (len(a.shape) - 1) + (i,))
        specs = [whole(a) if a.shape[0] != M else block(a) for a in args[:num_params]]
        shapes = [a.shape for a in out_shape]
        if groups > 1:  # [.., M] as [.. * groups, M / groups]
            parts = lambda a: a.reshape(-1, M // groups) if a.shape[-1] == M else a
            args = [*args[:num_params], *map(parts, args[num_params:])]
            out_shape = [jax.eval_shape(parts, a) for a in out_shape]
        compiler = {}
        if not self.interpret:
            compiler["compiler_params"] = self._triton.CompilerParams(num_warps=self.blocks.warps, num_stages=1)
        results = pl.pallas_call(
            kernel,
            grid=(pl.cdiv(M // groups, lanes),),
            in_specs=specs + [block(a) for a in args[num_params:]],
            out_specs=[block(a) for a in out_shape],
            out_shape=out_shape,
            **compiler,
            input_output_aliases=reused or {},
            interpret=self.interpret,
            name=name,
        )(*args)
        return [a.reshape(shape) for a, shape in zip(results, shapes, strict=True)]

    @property
    def _triton(self):
        # For every operation MLIR tries to import the module of its dialect, "tt", until it finds one. JAX keeps that module
        # elsewhere. For a ResNet-18, 6,358 imports failed: 1.2 s of one core.
        if dialect := sys.modules.get("jaxlib.triton.dialect"):
            sys.modules.setdefault("jaxlib.mlir.dialects.tt", dialect)
        return importlib.import_module(LOWERING)

    def _load(self, ref, mask):
        """The lanes of `ref` in `mask`, and 0 elsewhere."""
        if not self.interpret:
            return self._triton.load(ref, mask=mask, other=None if mask is None else 0.0)
        lanes = ref[...]
        return lanes if mask is None else jnp.where(mask, lanes, jnp.zeros_like(lanes))

    def _store(self, ref, lanes, mask):
        if not self.interpret:
            return self._triton.store(ref, lanes, mask=mask)
        ref[...] = lanes if mask is None else jnp.where(mask, lanes, ref[...])

    def _loop(self, C, index, load, chunk, carry):
        """Run chunk(c, carry, load(c)) for c = index(0..C-1). With `prefetch` the next chunk is loaded while this one runs."""
        if not self.blocks.prefetch or C < 2:
            return lax.fori_loop(0, C, lambda i, carry: chunk(index(i), carry, load(index(i))), carry)

        def body(i, carry):
            carry, loaded = carry
            ahead = load(index(jnp.minimum(i + 1, C - 1)))
            return chunk(index(i), carry, loaded), ahead

        return lax.fori_loop(0, C, body, (carry, load(index(jnp.int32(0)))))[0]

    def _lanes(self):
        return pl.program_id(0) * self.blocks.lanes + jnp.arange(self.blocks.lanes)

    def _mask(self):
        return None if self.problem.M % self.blocks.lanes == 0 else self._lanes() < self.problem.M

    def _where(self, condition, mask):
        """`mask` if the condition holds, else no lane."""
        mine = jnp.full((self.blocks.lanes,), condition)
        return mine if mask is None else mine & mask

    def _initial(self, state_refs, mask):
        if self.problem.initial is None:
            return tuple(self._load(ref.at[:], mask) for ref in state_refs)
        return tuple(jnp.full((self.blocks.lanes,), value, self.problem.dtype) for value in self.problem.initial)

    def _load_params(self, refs, mask):
        f32, M, shape = self.problem.dtype, self.problem.M, (self.blocks.lanes,)

        def load(ref):
            if math.prod(ref.shape) == 1 != M:
                return jnp.full(shape, ref[0].astype(f32))
            mine = ref.at[:] if ref.shape == shape else ref.at[self._lanes() % ref.shape[0]]
            return self._load(mine, mask).astype(f32)

        return tuple(load(ref) for ref in refs)

    def _load_steps(self, refs, start, k, mask):
        """The inputs of k steps in their own dtype. All loads come before any use, so that k of them are in flight."""
        return [tuple(self._load(ref.at[start + i], mask) for ref in refs) for i in range(k)]

    def _store_outs(self, refs, c, steps, mask):
        for i, (ref, d) in enumerate(zip(refs, self.problem.out_dtypes, strict=True)):
            leaves, start = [step[i] for step in steps], c * self.blocks.chunk
            if isinstance(d, Packed):
                leaves, start = d.words(leaves), c * (self.blocks.chunk // d.steps)
            self._store_steps([ref], start, [[leaf] for leaf in leaves], mask)

    def _store_steps(self, refs, start, steps, mask):
        for i, leaves in enumerate(steps):
            for ref, leaf in zip(refs, leaves, strict=True):
                self._store(ref.at[start + i], leaf.astype(ref.dtype), mask=mask)


class _Group:
    """A view of part `g` of a reference: index t of [.., lanes] is row t * groups + g of [.. * groups, lanes]."""

    def __init__(self, ref, groups, g):
        self.ref, self.groups, self.g, self.dtype = ref, groups, g, ref.dtype

    @property
    def at(self):
        return self

    def __getitem__(self, t):
        return self.ref.at[self.g if isinstance(t, slice) else t * self.groups + self.g]
