"""Timing and a training step of the temporal fusion paper's spiking ResNet-18, for all benchmarks on PyTorch.

`ms` is the time of a replayed CUDA graph. If no graph can be captured, `ms` is `call_ms` and `graph` says why.
benchmarks/peers.py calls the functions here. benchmarks/with_jax.py has the same ones for JAX.
"""

import gc
import time

import numpy as np
import runner
import torch
import torch.nn.functional as F

CUDA = torch.cuda.is_available()
ON = torch.device("cuda" if CUDA else "cpu")
torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
torch.backends.cudnn.benchmark = True
cross_entropy = F.cross_entropy
roll = lambda x, count: x.detach().roll(count, 1)
to_numpy = lambda x: x.detach().float().cpu().numpy()


def array(x, dtype="float32"):
    x = torch.from_numpy(np.ascontiguousarray(x)).to(ON)
    return x if not x.is_floating_point() else x.to(getattr(torch, dtype))


def pullback(f):
    def run(weight, x, cotangent):
        weight = weight.detach().requires_grad_()
        out = f(weight, x)
        return out, torch.autograd.grad(out, weight, cotangent.to(out.dtype))[0]

    return run


def adam_step(weights, loss_of):
    """A function of a batch that takes one step of Adam on loss_of(*batch), and returns the loss."""
    adam = torch.optim.Adam(weights, 1e-3, fused=True, capturable=CUDA)

    def step(*batch):
        adam.zero_grad(set_to_none=True)
        loss = loss_of(*batch)
        loss.backward()
        adam.step()
        return loss.detach()

    return step


def train(loss_of, weights):
    for weight in weights:
        weight.requires_grad_()
    return adam_step(weights, lambda *batch: loss_of(weights, *batch)[0]), ()


def run_once(f, *args):
    with torch.no_grad():
        return f(*args)


def sync(_=None):
    if CUDA:
        torch.cuda.synchronize()


def measure(f, sets, no_graph="") -> dict:
    """The most memory that a call holds, and its times."""
    try:
        f(*sets[0])
        sync()
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        f(*sets[0])
        sync()
        if time.perf_counter() - start > 5e-3:  # then no input is in the cache anyway
            sets = sets[:1]
        row = dict(peak_mb=torch.cuda.max_memory_allocated() / 1e6) if CUDA else {}
        call_ms, *quartiles = runner.time_ms(lambda: f(*sets[0]), sync)
        try:
            if no_graph or not CUDA:
                raise NotImplementedError(no_graph or "no GPU")
            ms, *quartiles = (t / len(sets) for t in runner.time_ms(graph(f, sets).replay, sync))
        except Exception as e:
            sync()
            return row | dict(ms=call_ms, quartiles=quartiles, call_ms=call_ms, graph=str(e)[:200])
        return row | dict(ms=ms, quartiles=quartiles, call_ms=call_ms)
    finally:  # the next library gets the memory
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()


def graph(f, sets):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for args in sets:
            f(*args)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for args in sets:
            f(*args)
    return graph


class OverTime(torch.nn.Module):
    """A neuron on [T, B, ...] within a network on [T * B, ...]."""

    def __init__(self, T, neuron):
        super().__init__()
        self.T, self.neuron = T, neuron

    def forward(self, x):
        return self.neuron(x.view(self.T, -1, *x.shape[1:])).flatten(0, 1)


def resnet_step(lif, dtype, T, B, size):
    """A function without arguments that takes one training step of torchvision's ResNet-18 and returns the loss.

    `lif` takes the place of ReLU; if it is None, the net keeps ReLU. "bfloat16" uses autocast; "tf32" uses TF32 for matrix
    products, and float32 elsewhere.
    """
    import torchvision

    torch.manual_seed(0)
    net = torchvision.models.resnet18(num_classes=10)
    for module in [module for module in net.modules() if hasattr(module, "relu")]:
        module.relu = torch.nn.ReLU() if lif is None else OverTime(T, lif)
    net = net.to(ON, memory_format=torch.channels_last)
    xs = (torch.rand(T * B, 3, size, size, device=ON) < 0.5).float().contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (B,), device=ON)

    def loss_of():
        with torch.autocast(ON.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            logits = net(xs).view(T, B, -1).mean(0)
        return F.cross_entropy(logits.float(), labels)

    return adam_step(net.parameters(), loss_of)


def zoo_step(name, way, T, B, size, classes):
    """A training step of a network of SpikingJelly's model zoo, and a function without arguments that takes it.

    `sew-resnet-18-cifar` is its SEW-ResNet-18 with a 3 x 3 stem of stride 1, without the max-pool. Words of `way`:

        bfloat16        autocast, and neurons that take 16-bit input and keep a float32 state (SEW-ResNet only); else TF32
        channels_last   the layout of images and weights
        compiled        the network goes through torch.compile
    """
    from spikingjelly.activation_based import functional, layer, neuron, surrogate
    from spikingjelly.activation_based.model import sew_resnet, spikformer, spiking_vgg

    class IF(torch.nn.Module):
        """`neuron.IFNode` runs a loop of Torch operations on 16-bit input; this function runs the fused kernels."""

        def forward(self, xs):
            state = torch.zeros_like(xs[0], dtype=torch.float32)
            return functional.if_multi_step(xs, state, 1.0, 0.0, surrogate.ATan(), detach_reset=True)[0]

    torch.manual_seed(0)
    if name == "spikformer-4-384":
        net = spikformer.spikformer_cifar10(T, classes)
    elif name == "vgg-11":
        options = dict(spiking_neuron=neuron.LIFNode, tau=2.0, decay_input=False, surrogate_function=surrogate.ATan())
        net = spiking_vgg.spiking_vgg11_bn(num_classes=classes, norm_layer=layer.BatchNorm2d, **options)
    else:
        options = dict(spiking_neuron=neuron.IFNode, surrogate_function=surrogate.ATan(), detach_reset=True)
        options = dict(spiking_neuron=IF) if "bfloat16" in way else options
        net = sew_resnet.sew_resnet18(num_classes=classes, cnf="ADD", **options)
    if name == "sew-resnet-18-cifar":
        net.conv1, net.maxpool = layer.Conv2d(3, 64, 3, padding=1, bias=False), layer.SeqToANNContainer()
    functional.set_step_mode(net, "m")
    layout = torch.channels_last if "channels_last" in way else torch.contiguous_format
    net = net.to(ON, memory_format=layout)
    run = torch.compile(net) if "compiled" in way else net
    images = torch.randn(B, 3, size, size, device=ON).contiguous(memory_format=layout)
    labels = (torch.arange(B) % classes).to(ON)

    def loss_of():
        functional.reset_net(net)
        with torch.autocast(ON.type, torch.bfloat16, enabled="bfloat16" in way):
            outs = run(images if name == "spikformer-4-384" else images.expand(T, *images.shape))
        return F.cross_entropy((outs if outs.ndim == 2 else outs.mean(0)).float(), labels)

    return adam_step(net.parameters(), loss_of)
