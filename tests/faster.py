"""Make many small programs cheaper to trace and to lower. conftest.py imports it, and so does the test of the notebooks."""

import gc
import itertools
from functools import lru_cache

from jax._src import core
from jax._src.interpreters import mlir

# Tracing makes many small objects that live long. Python would search them for garbage every 700 objects: a quarter of the time.
gc.set_threshold(500_000)

# JAX makes a new MLIR context for each program. That takes a quarter of the time of a small program, so 100 programs share one.
# A program that is lowered while another one is being lowered gets its own.
make_context, programs = mlir.make_ir_context, itertools.count()
shared_context = lru_cache(1)(lambda hundred: make_context())
mlir.make_ir_context = lambda: make_context() if mlir.ir.Context.current else shared_context(next(programs) // 100)


def no_sharding(tracer):
    raise AttributeError("a traced value has no sharding")


# Flax asks for it in every assignment to a variable. JAX would write an error with all equations so far, and Flax drop it.
core.Tracer.sharding = property(no_sharding)
