"""NIR files written by snnTorch, SpikingJelly, Norse and sinabs, and what each of them makes of an input, on the CPU.

    pip install torch==2.13.0 snntorch==1.0.0 spikingjelly==2.0.0 norse==1.1.0 sinabs==2.0.3 nir==1.0.8 nirtorch==2.6
    python tests/golden/nir/make_nir.py          # writes <case>.nir and runs.npz beside this file

Every case is a small network with random weights, run for T steps from rest on x = mean + std * normal. runs.npz holds

    versions, cases         JSON: of the packages; {case: {"dialect": of snnfuse.interop.nir, "change": fields replaced}}
    <case>/x, <case>/y      input [T, B, ...] and output [T, B, N], both in the order of the exporter, channels first;
                            y is spikes as uint8, or a membrane as float32

No spike changes when all inputs are scaled by 1 +- 1e-5, so that rounding cannot flip one.

Where an exporter's own graph does not pass NIR's checks, or is not what it ran, it is said here: snnTorch takes the shape
of a neuron's parameters from beta and threshold, so both are given in full; sinabs' neurons spike several times a step
unless spike_fn=SingleSpike, which its file cannot say.
"""

import importlib.metadata
import json
from pathlib import Path

import nir
import norse.torch
import norse.torch.module.leaky_integrator_box
import norse.torch.module.lif
import numpy as np
import sinabs.activation
import sinabs.layers
import sinabs.nir
import snntorch.utils
import torch
from norse.torch.module.iaf import IAFCell
from norse.torch.module.lif_box import LIFBoxCell, LIFBoxParameters
from norse.torch.utils.export_nir import to_nir as norse_to_nir
from snntorch.export_nir import export_to_nir as snntorch_to_nir
from spikingjelly.activation_based import functional, layer, neuron
from spikingjelly.activation_based.nir_exchange import export_to_nir as spikingjelly_to_nir
from torch.nn import AvgPool2d, Conv2d, Flatten, Linear, Sequential

HERE = Path(__file__).parent
T, B, N, HIDDEN, OUT = 24, 2, 12, 16, 8
IMAGE = (2, 8, 6)  # channels, height, width: all different, so that no transposition goes unseen
WEIGHT = 3.0  # times the default initialisation, for the second layer to fire


def leaky(n, **options):
    n = n if isinstance(n, tuple) else (n,)
    return snntorch.Leaky(
        torch.linspace(0.8, 0.8, int(np.prod(n))).reshape(n), torch.full(n, 0.7), init_hidden=True, **options
    )


def synaptic(n, **options):
    full = lambda value: torch.full((n,), value)
    return snntorch.Synaptic(full(0.5), full(0.8), full(0.9), init_hidden=True, **options)


def snntorch_cases():
    def dense(make, **options):
        return Sequential(
            Linear(N, HIDDEN), make(HIDDEN, **options), Linear(HIDDEN, OUT, bias=False), make(OUT, **options)
        )

    def run(net, x):
        snntorch.utils.reset(net)
        return torch.stack([net(x_t) for x_t in x])

    def export(net, x):
        snntorch.utils.reset(net)
        return snntorch_to_nir(net, x[0], ignore_dims=[0])

    several = leaky(OUT, reset_mechanism="zero", reset_delay=False)
    several.beta = torch.linspace(0.5, 0.95, OUT)
    soft = Sequential(Linear(N, OUT), leaky(OUT, reset_delay=False))
    soft[0].weight.data /= 16  # "soft" reads it too: every spike leaves v below the threshold
    conv = Sequential(
        Conv2d(2, 4, 3, stride=2, padding=1),
        leaky((4, 4, 3)),
        AvgPool2d((2, 1)),
        Flatten(),
        Linear(24, OUT),
        leaky(OUT),
    )
    hard = {"reset": "hard"}
    yield "snntorch_leaky", "SNNTORCH", {}, dense(leaky), run, export, (N,)
    yield "snntorch_leaky_soft", "SNNTORCH", {"reset": "prompt"}, soft, run, export, (N,)
    yield (
        "snntorch_leaky_zero",
        "SNNTORCH",
        hard | {"detach": True},
        dense(leaky, reset_mechanism="zero"),
        run,
        export,
        (N,),
    )
    yield "snntorch_leaky_betas", "SNNTORCH", hard, Sequential(Linear(N, OUT), several), run, export, (N,)
    yield "snntorch_synaptic", "SNNTORCH", {}, dense(synaptic), run, export, (N,)
    yield "snntorch_conv", "SNNTORCH", {}, conv, run, export, IMAGE


class Skip(torch.nn.Module):
    """A hidden layer beside a connection that skips it."""

    def __init__(self):
        super().__init__()
        self.first, self.spikes = layer.Linear(N, N), neuron.LIFNode(tau=3.0)
        self.second, self.out = layer.Linear(N, N), neuron.IFNode(v_reset=0.0)

    def forward(self, x):
        s = self.spikes(self.first(x))
        return self.out(self.second(s) + s)


def spikingjelly_cases():
    def dense(make):
        return Sequential(layer.Linear(N, HIDDEN), make(), layer.Linear(HIDDEN, OUT, bias=False), make())

    def run(net, x):
        functional.reset_net(net)
        return net(x)

    def export(net, x):
        functional.reset_net(net)
        return spikingjelly_to_nir(net, x)

    low = dict(v_reset=-0.1, v_threshold=0.3)
    conv = Sequential(
        layer.Conv2d(2, 4, (3, 3), padding="same", bias=False),
        neuron.ParametricLIFNode(init_tau=2.0, decay_input=False),
        layer.AvgPool2d(2),
        layer.Conv2d(4, 3, 3, stride=(2, 1), padding=(1, 0)),
        neuron.IFNode(),
        layer.Flatten(),
        layer.Linear(6, OUT),
        neuron.LIFNode(tau=2.0, decay_input=False),
    )
    line = Sequential(
        layer.Conv1d(2, 4, 5, stride=2, padding=2, dilation=1),
        neuron.IFNode(),
        layer.Flatten(),
        layer.Linear(24, OUT),
        neuron.IFNode(),
    )
    nets = {
        "spikingjelly_if": (dense(lambda: neuron.IFNode()), (N,)),
        "spikingjelly_lif": (dense(lambda: neuron.LIFNode(tau=2.5, **low)), (N,)),
        "spikingjelly_lif_out": (dense(lambda: neuron.LIFNode(tau=2.5, decay_input=False, v_reset=-0.1)), (N,)),
        "spikingjelly_cuba": (dense(lambda: neuron.CUBALIFNode(0.4, 0.7, v_threshold=0.8)), (N,)),
        "spikingjelly_conv": (conv, IMAGE),
        "spikingjelly_conv1d": (line, (2, 11)),
        "spikingjelly_skip": (Skip(), (N,)),
    }
    for name, (net, shape) in nets.items():
        functional.set_step_mode(net, "m")
        yield name, "SPIKINGJELLY", {}, net, run, export, shape


def norse_cases():
    full = lambda n, value: torch.full((n,), value)

    def box(n):
        return LIFBoxCell(LIFBoxParameters(tau_mem_inv=full(n, 300.0), v_th=full(n, 0.4), v_leak=full(n, 0.1)))

    def cuba(n):
        p = norse.torch.LIFParameters(full(n, 600.0), full(n, 300.0), full(n, 0.0), full(n, 0.5), full(n, 0.0))
        return norse.torch.module.lif.LIFCell(p)

    def leak(n):
        module = norse.torch.module.leaky_integrator_box
        return module.LIBoxCell(module.LIBoxParameters(tau_mem_inv=full(n, 200.0), v_leak=full(n, -0.1)))

    def iaf(n):
        return IAFCell(norse.torch.module.iaf.IAFParameters(v_th=full(n, 1.0)))

    def run(net, x):
        state, out = None, []
        for x_t in x:
            y, state = net(x_t, state)
            out.append(y)
        return torch.stack(out)

    def export(net, x):
        return norse_to_nir(net, x[0])

    for name, make, last in (("lif", box, box), ("cuba", cuba, cuba), ("if", iaf, iaf), ("li", box, leak)):
        net = norse.torch.SequentialState(Linear(N, HIDDEN), make(HIDDEN), Linear(HIDDEN, OUT), last(OUT))
        yield f"norse_{name}", "NORSE", {}, net, run, export, (N,)


def sinabs_cases():
    single = dict(spike_fn=sinabs.activation.SingleSpike, batch_size=B)
    full = lambda *shape, value: torch.full(shape, value)

    def lif(n, **options):
        return sinabs.layers.LIFSqueeze(
            tau_mem=full(n, value=3.0), spike_threshold=full(n, value=0.5), **single, **options
        )

    def run(net, x):  # [B * T, ...]
        sinabs.utils.reset_states(net)
        y = net(x.transpose(0, 1).flatten(0, 1))
        return y.unflatten(0, (B, len(x))).transpose(0, 1)

    def export(net, x):
        graph = sinabs.nir.to_nir(net, x.transpose(0, 1).flatten(0, 1))
        graph.infer_types()  # sinabs leaves the shapes open, and NIR does not write what is open
        return graph

    whole = {"jumps": ("LIF", "LI")}
    leak = sinabs.layers.ExpLeakSqueeze(tau_mem=full(OUT, value=4.0), batch_size=B)
    dense = lambda **options: Sequential(
        Linear(N, HIDDEN), lif(HIDDEN, **options), Linear(HIDDEN, OUT), lif(OUT, **options)
    )
    conv = Sequential(
        Conv2d(2, 4, 3, padding=1, bias=False),
        sinabs.layers.IAFSqueeze(**single),
        sinabs.layers.SumPool2d(2),
        Flatten(),
        Linear(48, OUT),
        sinabs.layers.IAFSqueeze(**single),
    )
    yield "sinabs_lif", "SINABS", {}, dense(), run, export, (N,)
    yield "sinabs_lif_whole", "SINABS", whole, dense(norm_input=False), run, export, (N,)
    yield (
        "sinabs_leak",
        "SINABS",
        {},
        Sequential(Linear(N, HIDDEN), lif(HIDDEN), Linear(HIDDEN, OUT), leak),
        run,
        export,
        (N,),
    )
    yield "sinabs_iaf_conv", "SINABS", {}, conv, run, export, IMAGE


def main():
    torch.set_num_threads(1)
    cases, arrays = {}, {}
    for makers in (snntorch_cases, spikingjelly_cases, norse_cases, sinabs_cases):
        torch.manual_seed(0)
        for name, dialect, change, net, run, export, shape in makers():
            for parameter_name, parameter in net.named_parameters():
                if parameter_name.endswith("weight"):
                    parameter.data *= WEIGHT
            torch.manual_seed(1)
            x = 0.5 + 2 * torch.randn(T, B, *shape)
            with torch.no_grad():
                y = run(net, x).numpy()
                near = [run(net, x * scale).numpy() for scale in (1 - 1e-5, 1 + 1e-5)]
                graph = export(net, x)
            if spiking := set(np.unique(y)) <= {0, 1}:
                assert all(np.array_equal(y, other) for other in near), f"{name}: a spike near the threshold"
                assert 0.02 < y.mean() < 0.6, f"{name}: firing rate {y.mean():.3f}"
            nir.write(HERE / f"{name}.nir", graph)
            arrays |= {f"{name}/x": x.numpy(), f"{name}/y": y.astype(np.uint8 if spiking else np.float32)}
            cases[name] = {"dialect": dialect, "change": change}
            print(f"{name}: mean {y.mean():.3f}, nodes {[type(n).__name__ for n in graph.nodes.values()]}")
    packages = ("torch", "snntorch", "spikingjelly", "norse", "sinabs", "nir", "nirtorch")
    versions = {name: importlib.metadata.version(name) for name in packages}
    np.savez_compressed(HERE / "runs.npz", versions=json.dumps(versions), cases=json.dumps(cases), **arrays)


if __name__ == "__main__":
    main()
