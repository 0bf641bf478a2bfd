"""The part of Triton that the generated kernels use, in NumPy: it runs one program at a time, with its lanes as an array.

Programs that wait for each other run in threads. A load or a store outside its array raises an error unless it is masked. A
GPU may let it pass unnoticed.
"""

import math
import re
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from inspect import Parameter, Signature

import jax
import numpy as np


class Lanes(np.ndarray):
    def to(self, dtype):
        return cast(self, dtype)


def lanes(x):
    return np.asarray(x).view(Lanes)


def cast(x, dtype):
    x = np.asarray(x)
    return lanes(x != 0 if dtype == np.bool_ else x.astype(dtype))


class Pointer:
    def __init__(self, array, offset=0):
        self.array, self.offset = array, offset
        self.dtype = types.SimpleNamespace(element_ty=array.dtype)

    def __add__(self, offset):
        return Pointer(self.array, self.offset + offset)

    def at(self, mask):
        offset, mask = np.broadcast_arrays(self.offset, True if mask is None else mask)
        inside = (offset >= 0) & (offset < self.array.size)
        assert (inside | ~mask).all(), f"offset {offset[mask & ~inside][0]} of an array of {self.array.size}"
        return np.where(mask, offset, 0), mask


def load(pointer, mask=None, other=None, cache_modifier=None):
    offset, mask = pointer.at(mask)
    return lanes(np.where(mask, pointer.array[offset], pointer.array.dtype.type(0) if other is None else other))


def store(pointer, value, mask=None):
    offset, mask = pointer.at(mask)
    assert np.asarray(value).dtype == pointer.array.dtype and np.shape(value) == np.shape(offset)
    pointer.array[offset[mask]] = np.asarray(value)[mask]


def multiple_of(x, n):
    assert (x[::n] % n == 0).all()
    return x


def max_contiguous(x, n):
    assert len(x) % n == 0 and (np.diff(x.reshape(-1, n)) == 1).all()
    return x


def where(condition, a, b):
    return lanes(np.where(condition, *(np.float32(v) if isinstance(v, float) else v for v in (a, b))))


def elementwise(f):
    return lambda *args: lanes(np.vectorize(f, otypes=[np.float32])(*args))


arrived = threading.Condition()


def arrive(pointer):
    with arrived:
        pointer.array[pointer.offset] += 1
        arrived.notify_all()


def wait(pointer, count):
    with arrived:
        assert arrived.wait_for(lambda: pointer.array[pointer.offset] >= count, timeout=20), "a program waits for ever"


language = types.ModuleType("triton.language")
vars(language).update(
    constexpr=None,
    float32=np.float32,
    float16=np.float16,
    bfloat16=jax.numpy.bfloat16.dtype,
    int64=np.int64,
    uint8=np.uint8,
    uint32=np.uint32,
    int1=np.bool_,
    PropagateNan=types.SimpleNamespace(ALL="all"),
    static_range=range,
    arange=lambda a, b: lanes(np.arange(a, b, dtype=np.int32)),
    full=lambda shape, value, dtype: lanes(np.full(shape, value, dtype)),
    zeros=lambda shape, dtype: lanes(np.zeros(shape, dtype)),
    cast=cast,
    reshape=lambda x, shape: lanes(np.reshape(x, shape)),
    sum=lambda x, axis: lanes(np.sum(x, axis, dtype=x.dtype)),
    dot=lambda a, b, total: lanes(total + a.astype(np.float32) @ b.astype(np.float32)),
    load=load,
    store=store,
    where=where,
    multiple_of=multiple_of,
    max_contiguous=max_contiguous,
    abs=np.abs,
    floor=np.floor,
    ceil=np.ceil,
    sqrt_rn=np.sqrt,
    maximum=lambda a, b, propagate_nan=None: np.maximum(a, b),
    minimum=lambda a, b, propagate_nan=None: np.minimum(a, b),
    libdevice=types.SimpleNamespace(
        **{name: getattr(np, name) for name in "exp exp2 expm1 log log1p sin cos tan sinh cosh tanh cbrt".split()},
        **{name: getattr(np, name) for name in "fmod nextafter rint".split()},
        **{f"a{name}": getattr(np, f"arc{name}") for name in "sin cos tan sinh cosh tanh tan2".split()},
        pow=np.power,
        rsqrt=lambda x: 1 / np.sqrt(x),
        round=lambda x: np.trunc(x + np.copysign(np.float32(0.5), x)),
        erf=elementwise(math.erf),
        erfc=elementwise(math.erfc),
        lgamma=elementwise(math.lgamma),
        erfinv=lambda x: lanes(jax.scipy.special.erfinv(np.asarray(x))),
    ),
)


def module(text):
    """The functions of a generated module, with NumPy for Triton."""
    assert "import triton\n" in text
    code = "\n".join(line for line in text.splitlines() if not line.startswith(("import ", "from ")))
    scope = dict(triton=types.SimpleNamespace(jit=lambda f: f), tl=language, libdevice=language.libdevice)
    exec(code, scope)
    if "get" in scope:  # inline assembly; tests of the PTX and on a GPU cover it
        scope |= dict(get=lambda pointer, mask=None: load(pointer, mask), put=store)
    if "wait" in scope:
        scope |= dict(arrive=arrive, wait=wait)
    return scope


def run(function, args, out_shapes, grid, constants):
    """Run a kernel once for each program of its grid, all at once if they wait for each other."""
    outs = [np.zeros(s.shape, s.dtype) for s in out_shapes]
    pointers = [a if np.ndim(a) == 0 else Pointer(np.array(a).reshape(-1)) for a in args]
    pointers += [Pointer(o.reshape(-1)) for o in outs]
    here = threading.local()
    language.program_id = lambda axis: np.int32(here.program[axis])

    def program(i):
        here.program = i
        with np.errstate(all="ignore"):
            function(*pointers, **constants)

    programs = list(np.ndindex(*grid))
    if "PROGRAMS" not in constants:
        for i in programs:
            program(i)
        return outs
    with ThreadPoolExecutor(len(programs)) as pool:
        list(pool.map(program, programs))
    return outs


def jax_triton(new, called):
    """A stand-in for jax_triton, 0.4 if `new` else 0.3: `called(kernel, args, shapes, grid, warps, constants)` runs."""
    out, options = ("out_type", "backend_options") if new else ("out_shape", "enable_fp_fusion")

    def triton_call(*args, kernel, grid, name, num_warps, num_stages, compute_capability, zeroed_outputs, **constants):
        shapes, fusion = constants.pop(out), constants.pop(options)
        for i, o in constants.pop("input_output_aliases").items():
            assert (args[i].shape, args[i].dtype) == (shapes[o].shape, shapes[o].dtype)
        assert (
            re.fullmatch("snn_(recurrent_)?(forward|backward)", name)
            and num_stages == 1
            and compute_capability in (None, 80, 90)
        )
        assert fusion == ({"enable_fp_fusion": True} if new else True)
        return called(kernel, args, shapes, grid, num_warps, constants)

    triton_call.__signature__ = Signature([Parameter(n, Parameter.KEYWORD_ONLY) for n in (out, options)])
    fake = types.ModuleType("jax_triton")
    fake.triton_call = triton_call
    return fake


def on_numpy(kernel, args, shapes, grid, warps, constants):
    arrays = [a for a in args if not isinstance(a, int)]

    def call(*arrays):
        arrays = iter(arrays)
        values = [a if isinstance(a, int) else np.asarray(next(arrays)) for a in args]
        return run(kernel, values, shapes, grid, constants)

    return jax.pure_callback(call, shapes, *arrays)


def install(monkeypatch, new=False, called=on_numpy):
    from snnfuse.ops import triton

    monkeypatch.setitem(sys.modules, "jax_triton", jax_triton(new, called))
    if called is on_numpy:
        monkeypatch.setattr(triton, "kernel", lambda text, name: module(text)[name])
