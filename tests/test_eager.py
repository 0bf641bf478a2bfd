"""Outside of `jit`, a call that equals an earlier one compiles nothing."""

import cases
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import monitoring

import snnfuse as sf
from snnfuse import nn, parallel
from snnfuse.nn import monitor
from snnfuse.ops import tuning

xs = cases.make("lif", T=6, lanes=(2, 4)).xs
weight = jnp.eye(4)
COMPILED = []


@pytest.fixture(scope="module")
def model():
    norm = nn.NormSpiking(nn.LIF(tau=2.0), nn.BatchNorm(4, rngs=nnx.Rngs(0)))
    return nn.Sequential(nn.Linear(4, 4, rngs=nnx.Rngs(0)), nn.LIF(tau=2.0, learn="decay"), norm, nn.LI(tau=2.0))


@pytest.fixture(scope="module")
def counted():
    def listen(name, *_, **__):
        if name.endswith("backend_compile_duration"):
            COMPILED.append(name)

    monitoring.register_event_duration_secs_listener(listen)
    jax.jit(lambda x: 3 * x)(jnp.ones(7))  # a new function: it compiles, whatever other tests have compiled before
    assert COMPILED, "nothing was counted at all"


def unroll(implementation):
    return sf.unroll(sf.LIF(), sf.LIFParams(), None, xs, implementation=implementation)


def gradient(implementation):
    return jax.grad(lambda xs: sf.unroll(sf.LIF(), sf.LIFParams(), None, xs, implementation=implementation)[0].sum())(
        xs
    )


def watch(model):
    with monitor.watch(model) as spikes:
        model(xs)
    return spikes


CALLS = {
    "scan": lambda model: unroll("scan"),
    "interpret": lambda model: unroll("interpret"),
    "gradient by scan": lambda model: gradient("scan"),
    "gradient by interpret": lambda model: gradient("interpret"),
    "recurrent": lambda model: sf.unroll_recurrent(sf.LIF(), sf.LIFParams(), None, xs, weight),
    "a gradient of recurrent": lambda model: jax.grad(
        lambda w: sf.unroll_recurrent(sf.LIF(), sf.LIFParams(), None, xs, w)[0].sum()
    )(weight),
    "model": lambda model: model(xs),
    "gradient of a model": lambda model: nnx.grad(lambda model: model(xs)[0].sum())(model),
    "init_state": lambda model: model.init_state(xs),
    "record": lambda model: monitor.record(model, xs),
    "record state": lambda model: monitor.record(model, xs, what="state"),
    "watch": watch,
    "operations": lambda model: monitor.operations(model, xs),
    "explain": lambda model: sf.explain(sf.LIF(), sf.LIFParams(), None, xs),
    "autotune": lambda model: sf.autotune(sf.LIF(), sf.LIFParams(), None, xs, implementation="interpret", seconds=0.0),
    "over_time": lambda model: over_time(xs),
}


@jax.jit  # `over_time` runs inside of shard_map, which is for jit
def over_time(xs):
    step = lambda xs: parallel.unroll_over_time(sf.LIF(), sf.LIFParams(), None, xs, implementation="scan")[0]
    mesh, along = parallel.make_mesh("time=1"), jax.sharding.PartitionSpec("time")
    return jax.shard_map(step, mesh=mesh, in_specs=along, out_specs=along, check_vma=False)(xs)


@pytest.mark.parametrize("name", CALLS)
def test_an_equal_call_compiles_nothing(name, model, counted, monkeypatch):
    monkeypatch.setattr(tuning, "write", lambda *_: None)  # tuned blocks would be another program
    CALLS[name](model)
    before = len(COMPILED)
    CALLS[name](model)
    assert len(COMPILED) == before


class Told(sf.LIF):
    """LIF that says when JAX traces it."""

    def init_state(self, shape):
        TRACED.append("init_state")
        return super().init_state(shape)

    def step(self, params, state, x):
        TRACED.append("step")
        return super().step(params, state, x)


TRACED = []


@pytest.mark.parametrize("i, name", [*enumerate(["scan", "interpret", "recurrent", "gradient", "explain"])])
def test_an_equal_call_traces_nothing(i, name):
    """Its checks do not either: they took most of the time of a call."""
    told = Told(sf.HardReset(0.01 * i))  # another neuron for each call: the first one is traced
    run = lambda xs, **options: sf.unroll(told, sf.LIFParams(), None, xs, **options)[0]
    calls = {
        "recurrent": lambda: sf.unroll_recurrent(told, sf.LIFParams(), None, xs, weight),
        "gradient": lambda: jax.grad(lambda xs: run(xs).sum())(xs),
        "explain": lambda: sf.explain(told, sf.LIFParams(), None, xs),
    }
    call = calls.get(name, lambda: run(xs, implementation=name))
    TRACED.clear()
    call()
    assert "step" in TRACED
    TRACED.clear()
    call()
    assert not TRACED
