"""Bad input raises an error that names the argument, what was wanted and what was got; limits of an implementation raise too."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import snnfuse as sf
from snnfuse import parallel

LIF, PARAMS = sf.LIF(), sf.LIFParams()
XS = jnp.ones((4, 2, 3))
V = jnp.zeros((2, 3))


def unroll(neuron=LIF, params=PARAMS, state=None, xs=XS, **options):
    return sf.unroll(neuron, params, state, xs, **options)


def lif(decay):
    return sf.LIFParams(decay=decay)


@dataclass(frozen=True)
class Custom:
    """LIF with its step or init_state replaced."""

    replaced_step: Any = LIF.step
    replaced_init: Any = LIF.init_state

    def init_state(self, shape):
        return self.replaced_init(shape)

    def step(self, params, state, x):
        return self.replaced_step(params, state, x)


@dataclass
class Unhashable:
    sizes: list

    init_state = LIF.init_state
    step = LIF.step


class OnlySteps:
    step = LIF.step


def with_init(init):
    return dict(neuron=Custom(replaced_init=init))


def with_step(step):
    return dict(neuron=Custom(step))


FLOATS = "must be float32, bfloat16 or float16 .float64 with 'scan'.; got "
ANY = "must have T >= 1 and no empty axis; got shape "
STRUCTURE = r"state must have the structure of neuron.init_state, PyTreeDef\(CustomNode\(namedtuple\[LIFState\], \[\*\]\)\); got "
OUT_DTYPE = r"out_dtype must be a dtype, or a tree of them like the outputs PyTreeDef\(\*\); got "

BAD = {
    # xs
    "xs a scalar": (dict(xs=jnp.float32(1)), ValueError, r"xs must be \[T, \*B, N\], of rank 2 or more; got shape \(\)"),
    "xs of rank 1": (dict(xs=jnp.ones(4)), ValueError, r"xs must be \[T, \*B, N\], of rank 2 or more; got shape \(4,\)"),
    "no steps": (dict(xs=jnp.ones((0, 2, 3))), ValueError, rf"xs {ANY}\(0, 2, 3\)"),
    "empty batch": (dict(xs=jnp.ones((4, 0, 3))), ValueError, rf"xs {ANY}\(4, 0, 3\)"),
    "no neurons": (dict(xs=jnp.ones((4, 2, 0))), ValueError, rf"xs {ANY}\(4, 2, 0\)"),
    "integer xs": (dict(xs=jnp.ones((4, 2, 3), int)), TypeError, f"xs {FLOATS}int32"),
    "bool xs": (dict(xs=np.ones((4, 2, 3), bool)), TypeError, f"xs {FLOATS}bool"),
    "complex xs": (dict(xs=jnp.ones((4, 2, 3), jnp.complex64)), TypeError, f"xs {FLOATS}complex64"),
    "8-bit floats": (dict(xs=jnp.ones((4, 2, 3), jnp.float8_e4m3fn)), TypeError, f"xs {FLOATS}float8_e4m3fn"),
    "random keys": (dict(xs=jax.random.split(jax.random.key(0), (4, 2, 3))), TypeError, f"xs {FLOATS}key<fry>"),
    "a bad leaf of xs": (dict(xs={"a": XS, "b": XS > 0}), TypeError, rf"xs\['b'\] {FLOATS}bool"),
    "a nested list": (dict(xs=[[[1.0, 2.0]]]), ValueError, r"xs\[0\]\[0\]\[0\] must be \[T, \*B, N\].*got shape \(\)"),
    "a string": (dict(xs="spikes"), TypeError, "xs must be an array; got 'spikes'"),
    "no xs": (dict(xs=None), ValueError, r"xs must have at least one array \[T, \*B, N\]; got None"),
    "no leaves": (dict(xs={}), ValueError, r"xs must have at least one array \[T, \*B, N\]; got {}"),
    "leaves that differ": (dict(xs=(XS, XS[..., :1])), ValueError, r"one shape in all its leaves; got \[\(4, 2, 3\), \(4, 2, 1\)\]"),
    "leaves that differ in T": (dict(xs=(XS, XS[:3])), ValueError, r"xs must have one shape.*\[\(4, 2, 3\), \(3, 2, 3\)\]"),
    # state
    "params and state swapped": (dict(params=None, state=PARAMS), ValueError, STRUCTURE + r".*LIFParams"),
    "state of another neuron": (dict(state=sf.CubaLIFState(V, V)), ValueError, STRUCTURE + r".*CubaLIFState"),
    "state an array": (dict(state=V), ValueError, STRUCTURE + r"PyTreeDef\(\*\)"),
    "state of one neuron": (dict(state=sf.LIFState(V[0])), ValueError, r"state.v must be \[\*B, N\] = \(2, 3\), as xs is without T; got \(3,\)"),
    "state with time": (dict(state=sf.LIFState(XS)), ValueError, r"state.v must be \[\*B, N\] = \(2, 3\), as xs is without T; got \(4, 2, 3\)"),
    "state a number": (dict(state=sf.LIFState(0.0)), ValueError, r"state.v must be \[\*B, N\] = \(2, 3\), as xs is without T; got \(\)"),
    "state in bfloat16": (dict(state=sf.LIFState(V.astype(jnp.bfloat16))), TypeError, "state.v must be float32; got bfloat16"),
    "state of integers": (dict(state=sf.LIFState(V.astype(int))), TypeError, "state.v must be float32; got int32"),
    "state a string": (dict(state=sf.LIFState("rest")), TypeError, "state.v must be an array; got 'rest'"),
    # params
    "params along B": (dict(params=lif(jnp.ones(2))), ValueError, r"params.decay must broadcast from the right against \[\*B, N\] = \(2, 3\); got \(2,\)"),
    "params with time": (dict(params=lif(jnp.ones((4, 2, 3)))), ValueError, r"params.decay must broadcast .*\(2, 3\); got \(4, 2, 3\)"),
    "params that enlarge N": (dict(params=lif(jnp.ones(4)), xs=XS[..., :1]), ValueError, r"params.decay must broadcast .*\(2, 1\); got \(4,\)"),
    "params that enlarge B": (dict(params=lif(jnp.ones((5, 1))), xs=XS[:, :1]), ValueError, r"params.decay must broadcast .*\(1, 3\); got \(5, 1\)"),
    "empty params": (dict(params=lif(jnp.ones((0,)))), ValueError, r"params.decay must broadcast .*\(2, 3\); got \(0,\)"),
    "integer params": (dict(params=lif(jnp.ones(3, int))), TypeError, "params.decay must be a number or a float array; got int32"),
    "bool params": (dict(params=lif(np.ones(3, bool))), TypeError, "params.decay must be a number or a float array; got bool"),
    "complex params": (dict(params=lif(1j)), TypeError, "params.decay must be a number or a float array; got complex64"),
    "params a string": (dict(params=lif("0.5")), TypeError, "params.decay must be an array; got '0.5'"),
    "params a class": (dict(params=sf.LIFParams), TypeError, "params must be an array; got <class .*LIFParams'>"),
    "no params": (dict(params=None), AttributeError, r"in neuron LIF.step\(params, state, x\), given params PyTreeDef\(None\)"),
    "params of another neuron": (dict(params=sf.IFParams()), AttributeError, r"(?s)'decay'.*\nin neuron LIF.step.*given params .*IFParams"),
    "params a dictionary": (dict(params={"decay": 0.5}), AttributeError, r"(?s)'decay'.*\nin neuron LIF.step.*given params PyTreeDef\({'decay': \*}\)"),
    "a NaN": (dict(params=lif(float("nan"))), ValueError, "params.decay must not be NaN; got nan"),
    "a NaN in an array": (dict(params=lif(jnp.array([1, jnp.nan, 1]))), ValueError, r"params.decay must not be NaN; got \[ 1. nan  1.\]"),
    "a NaN in bfloat16": (dict(params=lif(np.array([1, np.nan, 1], jnp.bfloat16))), ValueError, r"params.decay must not be NaN; got \[1 nan 1\]"),
    "a NaN in a dictionary": (dict(neuron=Custom(lambda p, s, x: (s, x)), params={"a": {"b": np.float32("nan")}}), ValueError, r"params\['a'\]\['b'\] must not be NaN"),
    # the neuron
    "a class": (dict(neuron=sf.LIF), TypeError, r"neuron must be an instance; got the class LIF: write LIF\(\)"),
    "nothing": (dict(neuron=None), TypeError, r"neuron must be an object with init_state and step; got None, without \['init_state', 'step'\]"),
    "no init_state": (dict(neuron=OnlySteps()), TypeError, r"got <.*OnlySteps.*>, without \['init_state'\]"),
    "a layer of snnfuse.nn": (dict(neuron=lambda xs: xs), TypeError, r"neuron must be .*without \['init_state', 'step'\]"),
    "unhashable": (dict(neuron=Unhashable([1])), TypeError, r"neuron must be hashable \(a frozen dataclass of hashable choices\); got Unhashable\(sizes=\[1\]\): unhashable type"),
    "an array for a choice": (dict(neuron=sf.LIF(v_rest=jnp.ones(3))), TypeError, r"neuron must be hashable .*v_rest=Array"),
    "a surrogate's class": (dict(neuron=sf.LIF(surrogate=sf.ATan)), TypeError, r"surrogate must be an object such as snnfuse.ATan\(\).*; got <class"),
    "a reset's name": (dict(neuron=sf.LIF(reset="hard")), TypeError, r"reset must be an object such as snnfuse.SoftReset\(\).*; got 'hard'"),
    "two inputs for one": (dict(xs=(XS, XS)), TypeError, r"in neuron LIF.step.*and x PyTreeDef\(\(\*, \*\)\)"),
    # its init_state
    "init_state of one shape": (with_init(lambda shape: LIF.init_state((1,))), ValueError, r"neuron Custom.init_state must return state.v in float32 of shape \[\*B, N\] = \(2, 3\); got float32\(1,\)"),
    "init_state a number": (with_init(lambda shape: sf.LIFState(0.0)), ValueError, r"neuron Custom.init_state must return state.v .*got float32\(\)"),
    "init_state of integers": (with_init(lambda shape: sf.LIFState(jnp.zeros(shape, int))), TypeError, r"neuron Custom.init_state must return state.v in float32.*got int32\(2, 3\)"),
    # its step
    "step without outputs": (with_step(lambda p, s, x: s), ValueError, r"neuron Custom.step must return \(state, out\); got LIFState"),
    "step returns nothing": (with_step(lambda p, s, x: None), ValueError, r"neuron Custom.step must return \(state, out\); got None"),
    "step returns three": (with_step(lambda p, s, x: (s, x, x)), ValueError, r"neuron Custom.step must return \(state, out\); got \(LIFState"),
    "another state structure": (with_step(lambda p, s, x: ((s.v,), x)), ValueError, r"neuron Custom.step must return the state in its own structure, .*LIFState.*; got PyTreeDef\(\(\*,\)\)"),
    "out before state": (with_step(lambda p, s, x: (x, s)), ValueError, r"neuron Custom.step must return the state in its own structure, .*; got PyTreeDef\(\*\)"),
    "another state shape": (with_step(lambda p, s, x: (sf.LIFState(s.v[:1]), x)), ValueError, r"neuron Custom.step must return state.v of shape \[\*B, N\] = \(2, 3\); got \(1, 3\)"),
    "another state dtype": (with_step(lambda p, s, x: (sf.LIFState(s.v.astype(jnp.bfloat16)), x)), TypeError, "neuron Custom.step must return state.v in float32; got bfloat16"),
    "a state of bools": (with_step(lambda p, s, x: (sf.LIFState(s.v > 0), x)), TypeError, "neuron Custom.step must return state.v in float32; got bool"),
    "another output shape": (with_step(lambda p, s, x: (s, x.sum(-1))), ValueError, r"neuron Custom.step must return outputs of shape \[\*B, N\] = \(2, 3\); got .*shape=\(2,\)"),
    "one bad output of two": (with_step(lambda p, s, x: (s, {"spike": x, "rate": x.mean()})), ValueError, r"must return outputs of shape \[\*B, N\] = \(2, 3\); got .*'rate': .*shape=\(\)"),
    "no output": (with_step(lambda p, s, x: (s, None)), ValueError, r"neuron Custom.step must return outputs of shape \[\*B, N\] = \(2, 3\); got None"),
    "an output of text": (with_step(lambda p, s, x: (s, "spike")), TypeError, r"(?s)class 'str'.*in neuron Custom.step\(params, state, x\)"),
    "its own error": (with_step(lambda p, s, x: 1 / 0), ZeroDivisionError, r"(?s)division by zero.*\nin neuron Custom.step"),
    "if on a value": (with_step(lambda p, s, x: (s, x) if x[0, 0] > 0 else (s, -x)), jax.errors.TracerBoolConversionError, "(?s)in neuron Custom.step"),
    # options
    "an unknown implementation": (dict(implementation="cuda"), ValueError, r"implementation must be None or one of \['interpret', .*'pallas', 'scan'.*\]; got 'cuda'"),
    "an empty implementation": (dict(implementation=""), ValueError, "implementation must be None or one of .*; got ''"),
    "a list of implementations": (dict(implementation=["scan"]), ValueError, r"implementation must be None or one of .*; got \['scan'\]"),
    "a dtype's name misspelt": (dict(out_dtype="flaot32"), TypeError, OUT_DTYPE + "'flaot32'"),
    "a number for a dtype": (dict(out_dtype=3), TypeError, OUT_DTYPE + "3"),
    "two dtypes for one output": (dict(out_dtype=(jnp.int8, jnp.int8)), TypeError, OUT_DTYPE + r"\(<class"),
    "a dictionary for one output": (dict(out_dtype={"s": jnp.int8}), TypeError, OUT_DTYPE + "{'s'"),
    "complex outputs": (dict(out_dtype=jnp.complex64), TypeError, "out_dtype must be a floating, integer or bool dtype; got complex64"),
    "outputs of text": (dict(out_dtype=str), TypeError, "out_dtype must be a floating, integer or bool dtype; got <U0"),
    "outputs wider than JAX's": (dict(out_dtype=jnp.float64), TypeError, "out_dtype float64 needs 64-bit types"),
}  # fmt: skip


@pytest.mark.parametrize("how", BAD)
def test_bad_input(how):
    """In an eager call, and under jit with the arrays as constants."""
    call, error, message = BAD[how]
    with pytest.raises(error, match=message):
        unroll(**call)
    with pytest.raises(error, match=message):
        jax.jit(lambda: unroll(**call))()


@pytest.mark.parametrize("implementation", ["scan", "interpret", "pallas", None])
def test_every_implementation_is_checked_alike(implementation):
    with pytest.raises(ValueError, match="params.decay must not be NaN"):
        unroll(params=lif(np.nan), implementation=implementation)
    with pytest.raises(TypeError, match="xs must be float32.*got int32"):
        unroll(xs=XS.astype(int), implementation=implementation)


def test_a_nan_is_found_where_there_is_a_value_and_passed_on_where_there_is_none():
    decay = jnp.array([0.5, jnp.nan, 0.5])
    with pytest.raises(ValueError, match="params.decay must not be NaN"):
        jax.jit(lambda xs: unroll(params=lif(decay), xs=xs))(XS)
    with pytest.raises(ValueError, match="params.decay must not be NaN"):
        jax.vjp(lambda xs: unroll(params=lif(decay), xs=xs), XS)
    _, state = jax.jit(lambda decay: unroll(params=lif(decay)))(decay)
    np.testing.assert_array_equal(np.isnan(state.v), [[False, True, False]] * 2)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="for a machine without a GPU")
def test_pallas_on_a_cpu_says_what_runs_there():
    with pytest.raises(
        NotImplementedError, match="implementation 'pallas': it needs a GPU, the device is a cpu; `interpret` runs"
    ):
        unroll(implementation="pallas")  # fmt: skip
    (outs, _), (want, _) = unroll(), unroll(implementation="scan")  # None picks one that runs
    np.testing.assert_array_equal(outs, want)


def test_float64_is_for_scan():
    with jax.enable_x64(True):
        xs = jnp.ones((4, 2, 3), jnp.float64)
        with pytest.raises(
            NotImplementedError, match="implementation 'interpret': it computes in float32; xs is float64"
        ):
            unroll(xs=xs, implementation="interpret")  # fmt: skip
        with pytest.raises(TypeError, match="state.v must be float64; got float32"):
            unroll(xs=xs, state=sf.LIFState(V))
        for outs, state in (unroll(xs=xs), unroll(xs=xs, implementation="scan")):
            assert outs.dtype == state.v.dtype == jnp.float64
        assert unroll(out_dtype=jnp.float64)[0].dtype == jnp.float64


class ClosesOverAnArray:
    """A valid neuron, whose array broadcasts against the lanes. A kernel cannot run it: it does not know which lanes its block holds."""

    def __init__(self, gain):
        self.gain = gain

    def init_state(self, shape):
        return LIF.init_state(shape)

    def step(self, params, state, x):
        return LIF.step(params, state, self.gain * x)


@pytest.mark.parametrize(("kind", "N"), [(np.asarray, 3), (jnp.asarray, 32), (np.asarray, 128)])
def test_a_step_that_closes_over_an_array_runs_under_scan_alone(N, kind):
    """Also if N happens to be the number of lanes of a block: the kernel must not take the array for that of its block."""
    gain = np.linspace(0.5, 3.0, N, dtype=np.float32)
    neuron, xs = ClosesOverAnArray(kind(gain)), jnp.full((6, 2, N), 0.4)
    outs, _ = unroll(neuron, xs=xs, implementation="scan")
    want, _ = unroll(xs=xs * gain, implementation="scan")
    assert 0.02 < want.mean() < 0.9
    np.testing.assert_array_equal(outs, want)
    with pytest.raises(NotImplementedError, match="implementation 'interpret': neuron ClosesOverAnArray: its step"):
        unroll(neuron, xs=xs, implementation="interpret")


def test_a_scalar_array_that_a_step_closes_over_is_a_constant():
    neuron = ClosesOverAnArray(jnp.float32(2.5))
    xs = jax.random.normal(jax.random.key(0), (6, 2, 30))
    outs, _ = unroll(neuron, xs=xs, implementation="interpret")
    want, _ = unroll(xs=2.5 * xs, implementation="scan")
    assert 0.02 < want.mean() < 0.4
    np.testing.assert_array_equal(outs, want)


def test_none_takes_scan_on_a_gpu_for_a_step_that_closes_over_an_array():
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)):
        jaxpr = jax.make_jaxpr(partial(unroll, ClosesOverAnArray(np.ones(3, np.float32)), PARAMS, None))(XS)
        with pytest.raises(NotImplementedError, match="implementation 'pallas': neuron ClosesOverAnArray"):
            jax.make_jaxpr(lambda: unroll(ClosesOverAnArray(np.ones(3, np.float32)), implementation="pallas"))()
    assert " scan[" in str(jaxpr)  # inside a call of its own, or inlined


def test_an_enclosing_name_reaches_every_leaf_of_a_tree_of_out_dtypes():
    """out_dtype may be one dtype or a tree like the outputs, also if that is a dictionary with one output."""
    neuron = Custom(lambda p, s, x: (s, {"x": x}))
    assert unroll(neuron, out_dtype={"x": jnp.bfloat16})[0]["x"].dtype == jnp.bfloat16
    assert unroll(neuron, out_dtype=jnp.bfloat16)[0]["x"].dtype == jnp.bfloat16
    with pytest.raises(TypeError, match=r"out_dtype must be .*like the outputs PyTreeDef\({'x': \*}\); got {'y'"):
        unroll(neuron, out_dtype={"y": jnp.bfloat16})


@pytest.mark.parametrize("implementation", ["scan", "interpret"])
def test_nothing_is_modified(implementation):
    """Neither a call that fails nor one that runs changes its NumPy arguments or donates its JAX arrays."""
    params = sf.LIFParams(np.full(3, 0.7, np.float32), np.ones((2, 1), np.float32))
    state, xs = sf.LIFState(np.full((2, 3), 0.2, np.float32)), np.full((5, 2, 3), 0.6, np.float32)
    before = jax.tree.map(np.copy, (params, state, xs))
    for arrays in ((params, state, xs), jax.tree.map(jnp.asarray, (params, state, xs))):
        with pytest.raises(TypeError):
            sf.unroll(LIF, *arrays, implementation=implementation, out_dtype="nonsense")
        outs, final = sf.unroll(LIF, *arrays, implementation=implementation)
        assert 0.02 < outs.mean() < 0.9 and np.any(final.v != state.v)
        jax.tree.map(np.testing.assert_array_equal, arrays, before)


def test_interpret_says_that_it_does_not_run_under_check_vma():
    mesh, cut = parallel.make_mesh("data=1"), PartitionSpec(None, "data")
    run = lambda xs: sf.unroll(sf.LIF(), sf.LIFParams(), None, xs, implementation="interpret")[0]
    under = lambda check: jax.shard_map(run, mesh=mesh, in_specs=cut, out_specs=cut, check_vma=check)(
        jnp.ones((2, 2, 8))
    )
    assert under(False).shape == (2, 2, 8)
    with pytest.raises(NotImplementedError, match="interpret: .* shard_map with check_vma=True; .*check_vma=False"):
        under(True)


@dataclass(frozen=True)
class Compares:
    """It thresholds without `sf.spike`."""

    surrogate: Any = None

    def init_state(self, shape):
        return jnp.zeros(shape)

    def step(self, params, v, x):
        u = 0.5 * v + x
        s = (u >= 1).astype(u.dtype) if self.surrogate is None else sf.spike(u - 1, self.surrogate)
        return u * (1 - s), s


def test_a_step_without_a_gradient_is_named_once():
    xs = jnp.ones((3, 2, 4))
    with pytest.warns(UserWarning, match="neuron Compares: the gradient of its outputs is zero.*snnfuse.spike"):
        sf.unroll(Compares(), None, None, xs)
    sf.unroll(Compares(), None, None, xs)  # a second warning would be an error
    sf.unroll(Compares(sf.ATan()), None, None, xs)


@dataclass(frozen=True)
class Counts(Compares):
    """Its output is an integer, which says by itself that it has no gradient."""

    def step(self, params, v, x):
        return v, jnp.floor(x).astype(jnp.int32)


def test_integer_outputs_need_no_gradient():
    outs, _ = sf.unroll(Counts(), None, None, jnp.full((3, 2, 4), 2.5))  # a warning would be an error
    assert (outs == 2).all()
