"""Flax's tools work on every module and every model: tabulate, display, print, pickle and iter_modules. help() is complete."""

import inspect
import pickle
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import snnfuse as sf
from snnfuse import models, nn
from snnfuse.core import neurons

rngs = lambda: nnx.Rngs(0)
xs = jax.random.normal(jax.random.key(0), (3, 2, 4))
image = jax.random.normal(jax.random.key(1), (2, 1, 8, 8, 3))
spikes = nn.Spikes.of((xs > 0).astype(jnp.float32))
norm_spiking = lambda **options: nn.NormSpiking(nn.LIF(tau=2.0), nn.BatchNorm(4, rngs=rngs()), **options)

# {case: (make, arguments)}; the name before the first space is the class or function of snnfuse.nn or snnfuse.models
CASES = {
    "IF": (nn.IF, (xs,)),
    "Dropout": (partial(nn.Dropout, 0.5, deterministic=True), (xs,)),
    "LIF": (partial(nn.LIF, tau=2.0, learn="decay"), (xs,)),
    "LIF on Spikes": (partial(nn.LIF, decay=jnp.full(4, 0.5)), (spikes, nn.LIF(tau=2.0).init_state(xs))),
    "ParametricLIF": (nn.ParametricLIF, (xs,)),
    "CubaLIF": (partial(nn.CubaLIF, tau_syn=2.0, tau=2.0), (xs,)),
    "AdaptiveLIF": (partial(nn.AdaptiveLIF, tau=2.0, tau_adapt=9.0), (xs,)),
    "ExpIF": (partial(nn.ExpIF, tau=2.0), (xs,)),
    "Izhikevich": (nn.Izhikevich, (xs,)),
    "LI": (partial(nn.LI, tau=2.0), (xs,)),
    "Spiking": (partial(nn.Spiking, neurons.LIF, neurons.LIFParams(0.5, 1.0), surrogate=sf.Sigmoid()), (xs,)),
    "Sequential": (lambda: nn.Sequential(nnx.Linear(4, 3, rngs=rngs()), nn.IF(), nn.LI(tau=2.0)), (xs,)),
    "Folded": (lambda: nn.Folded(nnx.Linear(4, 3, rngs=rngs())), (xs,)),
    "Recurrent": (lambda: nn.Recurrent(nn.LIF(tau=2.0), 4, rngs=rngs()), (xs,)),
    "Feedback": (lambda: nn.Feedback(nn.LIF(tau=2.0), nnx.Linear(4, 4, use_bias=False, rngs=rngs())), (xs,)),
    "Remat": (lambda: nn.Remat(nn.LIF(tau=2.0)), (xs,)),
    "Pieces": (lambda: nn.Pieces(nn.LIF(tau=2.0), 2), (xs,)),
    "PackSpikes": (nn.PackSpikes, (spikes.values,)),
    "Conv": (lambda: nn.Conv(3, 4, (3, 3), rngs=rngs()), (image,)),
    "Linear": (lambda: nn.Linear(4, 3, rngs=rngs()), (xs,)),
    "Linear on Spikes": (lambda: nn.Linear(4, 3, rngs=rngs()), (spikes,)),
    "TimeConv": (lambda: nn.TimeConv(3, 4, (2, 3, 3), rngs=rngs()), (image,)),
    "BatchNorm": (lambda: nn.BatchNorm(4, rngs=rngs()), (xs,)),
    "NormSpiking": (norm_spiking, (xs,)),
    "NormSpiking with bits": (partial(norm_spiking, pack=True, connect="and"), (xs, None, spikes)),
    "Delay": (lambda: nn.Delay(4, 2, rngs=rngs()), (xs,)),
    "DelayedLinear": (lambda: nn.DelayedLinear(4, 3, 2, rngs=rngs()), (xs,)),
    "PSN": (lambda: nn.PSN(3, rngs=rngs()), (xs,)),
    "MaskedPSN": (lambda: nn.MaskedPSN(3, 2, rngs=rngs()), (xs,)),
    "SlidingPSN": (lambda: nn.SlidingPSN(2), (xs,)),
    "TEBN": (lambda: nn.TEBN(3, 4, rngs=rngs()), (xs,)),
    "Quantised": (lambda: nn.Quantised(nn.Linear(4, 3, rngs=rngs()), 4), (xs,)),
    "Residual": (lambda: models.Residual(nn.Sequential(nn.Linear(4, 4, rngs=rngs())), norm_spiking()), (xs,)),
    "MembraneResidual": (
        lambda: models.MembraneResidual(norm_spiking(), nn.Sequential(nn.Linear(4, 4, rngs=rngs()))),
        (xs,),
    ),
    "SelfAttention": (lambda: models.SelfAttention(1), (jnp.ones((2, 1, 5, 6)),)),
    "TokenAttention": (lambda: models.TokenAttention(1, nn.IF()), (jnp.ones((2, 1, 5, 6)),)),
    "spiking_resnet": (lambda: models.spiking_resnet(18, 3, 4, stem="cifar", memory="lean", rngs=rngs()), (image,)),
    "sew_resnet": (lambda: models.sew_resnet(18, 3, 4, rngs=rngs()), (image,)),
    "spiking_vgg": (lambda: models.spiking_vgg(11, 3, 4, hidden=8, rngs=rngs()), (jnp.ones((1, 1, 32, 32, 3)),)),
    "spikformer": (lambda: models.spikformer(3, 4, depth=1, width=16, heads=2, rngs=rngs()), (image,)),
    "qkformer": (lambda: models.qkformer(3, 4, depth=3, width=32, heads=2, rngs=rngs()), (image,)),
}


def test_every_module_and_model_is_here():
    named = {name.split()[0] for name in CASES}
    module = lambda x: inspect.isclass(x) and issubclass(x, nnx.Module)
    model = lambda x: inspect.isfunction(x) and inspect.signature(x, eval_str=True).return_annotation is nn.Sequential
    wanted = {n for n in nn.__all__ if module(getattr(nn, n))} - {"Temporal", "Timeless"}  # these two have no __call__
    assert wanted | {n for n in models.__all__ if module(getattr(models, n)) or model(getattr(models, n))} == named


TABLE = dict(console_kwargs=dict(width=200, force_terminal=False))


@pytest.mark.parametrize("name", CASES)
def test_flax_shows_and_pickles_it(name, capsys, monkeypatch):
    monkeypatch.setitem(models.resnet.DEPTHS, 18, (1, 1, 0, 0))  # a block with each kind of shortcut
    make, args = CASES[name]
    model, tables = make(), []
    for _ in range(2):  # a call that fails would leave its wrappers on the classes
        tabulate = lambda *args: tables.append(nnx.tabulate(model, *args, **TABLE))
        if hasattr(models, name):  # these take long to compile, so they are only traced
            jax.eval_shape(tabulate, *args)
        else:
            tabulate(*args)
    assert f"{type(model).__name__} Summary" in tables[0] and "Total Parameters" in tables[0]
    assert tables[0] == tables[1]
    print(model)
    nnx.display(model)
    assert capsys.readouterr().out.count(f"{type(model).__name__}(") >= 2
    assert [m for path, m in nnx.iter_modules(model) if path == ()] == [model]
    copy = pickle.loads(pickle.dumps(model))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(copy), nnx.state(model))
    want, got = (str(jax.make_jaxpr(lambda *args, m=m: nnx.clone(m)(*args))(*args)) for m in (model, copy))
    assert got == want, "the copy computes the same"


def test_a_table_shows_states_and_bits_by_name():
    table = nnx.tabulate(norm_spiking(pack=True), xs, **TABLE)
    for part in ("values: float32[3,2,4]", "bits: uint8[1,2,4]", "v: float32[2,4]", "scale: float32[4]"):
        assert part in table


NEURONS = ["IF", "LIF", "ParametricLIF", "CubaLIF", "AdaptiveLIF", "ExpIF", "Izhikevich", "LI"]


@pytest.mark.parametrize("name", NEURONS)
def test_help_shows_equation_arguments_and_defaults(name):
    layer = getattr(nn, name)
    text = inspect.getdoc(layer)
    module = CASES[name][0]()
    words = lambda text: " ".join(text.split())
    equations = [line.strip() for line in inspect.getdoc(type(module.neuron)).splitlines() if "[t] =" in line]
    assert equations and all(words(equation) in words(text) for equation in equations), "the equations of snnfuse.core"
    arguments = text[text.index("Args:") :]
    given = {p.name: p.default for p in inspect.signature(layer).parameters.values() if p.kind is p.KEYWORD_ONLY}
    choices = {f: v.default for f, v in type(module.neuron).__dataclass_fields__.items()}
    spiking = {p.name: p.default for p in inspect.signature(nn.Spiking).parameters.values() if p.kind is p.KEYWORD_ONLY}
    for argument, default in (spiking | choices | given).items():
        lines = [line for line in arguments.splitlines() if argument in line.replace("=", ",").replace(":", ",")]
        assert lines, f"help(nn.{name}) does not name {argument}"
        shown = repr(default)
        for standard in ("HardReset()", "ATan()"):
            if default == eval(f"sf.{standard}"):
                shown = standard
        shown = "v_reset=-0.1" if shown.startswith("HardReset(v_reset=-0.1") else shown
        assert default is None or any(shown in line for line in arguments.splitlines() if argument in line), (
            f"help(nn.{name}) gives no default {shown} of {argument}"
        )
