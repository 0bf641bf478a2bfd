"""What a training step will cost on a mesh, before one is bought: data parallel, time as a pipeline, and both.

A step on D x G devices (D along data, G along time, m microbatches a wavefront) takes the sum of

    dense       3 flops / rate                            forward and twice that backward, 1 / (D G) of the work each
    neurons     2 wavefronts a layer: (m + G - 1) ticks of c and (m + G - 2) hand-overs of h (below)
    gradients   one all-reduce of the weights over all D G devices
    statistics  two small all-reduces a normalised layer, forward and backward, where batch statistics are synchronised
    launches    what a kernel costs at least, however small

in seconds. Nothing is overlapped, so it bounds from above what a scheduler may improve.

Held against two H100s (benchmarks/results/multi_gpu.jsonl; the README's table has every error), data parallel steps of
Spiking-ResNet-18 took 17 to 19 % less than predicted, but those on one device 28 to 39 % less, so the speed-up is
predicted too high: 1.94x for 1.46x at a fixed batch of 200. A batch of 16 on one device took 3 times what is predicted:
the launches of a small step are more than the model counts. Time over two devices took 5.5 to 6.2 times what is predicted
for a stack of LIF layers, and 3 to 45 times what one device takes: a tick has a kernel and a hand-over in the model, but
not what cuts, skews, slices and stacks the microbatches around them. Trust no rank of a mesh with a time axis.

The wavefront. With Ts the time of a layer's neurons on one device (one direction), a tick takes c = Ts / (G m), and with
a hand-over of h = Tc,

    W(G, m) = (m + G - 1) Ts / (G m) + (m + G - 2) Tc

Setting dW/dG = 0 gives G = sqrt((1 - 1/m) Ts / Tc), for many microbatches the optimum sqrt(Ts / Tc) of Li et al., ICANN
2024 (https://arxiv.org/abs/2408.00280); dW/dm = 0 gives the same for m with G in its place. `simulate` runs the
wavefront event by event, and must agree.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Machine:
    """Rates of one device and of what connects devices: bytes, flops and seconds.

    `link` and `latency` connect the `per_host` devices of a host, `network` (a device's share) and `network_latency`
    the hosts. `launch` is the least time of a kernel.
    """

    memory: float
    flops: float
    link: float
    latency: float
    network: float
    network_latency: float
    per_host: int = 8
    launch: float = 5e-6
    capacity: float = 80e9


# memory: the copy rate measured on this card (benchmarks/results/core.jsonl). flops: what convolutions of a small ResNet
# reached in a prototype, far below the peak, and below what they reach now. link: 240 MB more take a hand-over 0.700 ms
# (multi_gpu.jsonl, hand-over, 16 and 256 MB; an all-reduce 0.919 ms, which is 2.7e11). latency: half an all-reduce inside
# a program, 34 in 0.60 ms (multi_gpu.jsonl, resnet18 on 2 devices, synchronised or not); a call of one collective of 1 KB
# takes 0.12 to 0.17 ms, most of it the dispatch. network, its latency and launch: nominal or assumed.
H100 = Machine(
    memory=2.9e12, flops=1.4e14, link=3.6e11, latency=9e-6, network=4.0e10, network_latency=1.5e-5, capacity=80e9
)


class Layer(NamedTuple):
    """A connection and the neurons behind it, for one sample.

    `neurons` a sample; `flops` of the connection a sample and step, forward; `weights` its number of parameters;
    `state` float32 leaves a neuron; `normalised`: batch statistics before the neurons.
    """

    neurons: int
    flops: float
    weights: int
    state: int = 1
    normalised: bool = True


@dataclass(frozen=True)
class Plan:
    """A mesh and its predicted step: seconds by part, and bytes of memory on a device."""

    data: int
    time: int
    microbatches: int
    dense: float
    neurons: float
    gradients: float
    statistics: float
    bytes: float

    @property
    def seconds(self) -> float:
        return self.dense + self.neurons + self.gradients + self.statistics

    @property
    def devices(self) -> int:
        return self.data * self.time

    def __str__(self):
        return (
            f"data={self.data},time={self.time}, {self.microbatches} microbatches: {self.seconds * 1e3:.3f} ms "
            f"(dense {self.dense * 1e3:.3f}, neurons {self.neurons * 1e3:.3f}, gradients {self.gradients * 1e3:.3f}, "
            f"statistics {self.statistics * 1e3:.3f}), {self.bytes / 1e9:.2f} GB a device"
        )


def plan(
    layers: Sequence[Layer],
    T: int,
    batch: int,
    devices: int,
    machine: Machine = H100,
    *,
    itemsize: int = 2,
    synchronised: bool = False,
    exactly: bool = False,
) -> list[Plan]:
    """All meshes of at most (or `exactly`) `devices` that divide batch and T and fit in memory, the fastest first.

    Each comes with its best number of microbatches. `itemsize` is that of activations. Along a time axis batch
    statistics are always synchronised, along data if `synchronised`.
    """
    if min(T, batch, devices) < 1 or not layers:
        raise ValueError(f"T, batch and devices must be at least 1, of some layers; got {T}, {batch}, {devices}")
    plans = [
        predict(layers, T, batch, D, G, m, machine, itemsize=itemsize, synchronised=synchronised)
        for D in _divisors(batch, devices)
        for G in _divisors(T, devices // D)
        if not exactly or D * G == devices
        for m in (_divisors(batch // D, batch // D) if G > 1 else [1])
    ]
    best = {}
    for p in plans:
        key = p.data, p.time
        if p.bytes <= machine.capacity and (key not in best or p.seconds < best[key].seconds):
            best[key] = p
    if not best:
        least = min(plans, key=lambda p: p.bytes, default=None)
        why = f"the smallest needs {least}" if least else f"none of {devices} divides batch and T"
        raise ValueError(f"no mesh of {devices} devices runs T={T}, batch={batch}: {why}")
    return sorted(best.values(), key=lambda p: (p.seconds, p.devices))


def predict(
    layers: Sequence[Layer],
    T: int,
    batch: int,
    data: int,
    time: int,
    microbatches: int,
    machine: Machine = H100,
    *,
    itemsize: int = 2,
    synchronised: bool = False,
) -> Plan:
    """The cost of one mesh: with time > 1, far below what was measured (above)."""
    D, G, m, n = data, time, microbatches, data * time
    steps = T * batch / n  # sample-steps a device
    dense = sum(max(3 * layer.flops * steps / machine.flops, 3 * machine.launch) for layer in layers)
    neurons = 0.0
    for layer in layers:
        for units in (2, 3):  # forward x and s; backward x, ds and dx
            Ts = units * itemsize * layer.neurons * T * batch / D / machine.memory
            c = max(Ts / (G * m), machine.launch)
            h = hand_over(4 * layer.state * layer.neurons * batch / D / m, machine, n) if G > 1 else 0.0
            neurons += wavefront(G, m, c, h)
    weights = sum(layer.weights for layer in layers)
    normalised = [layer for layer in layers if layer.normalised]
    shared = (n if synchronised else G) if G > 1 or synchronised else 1
    statistics = 2 * len(normalised) * all_reduce(1e3, shared, machine)  # a few hundred channels: latency alone
    activations = (
        sum(2 * itemsize * layer.neurons for layer in layers) * steps
    )  # a layer's input current and its spikes
    return Plan(D, G, m, dense, neurons, all_reduce(4 * weights, n, machine), statistics, activations + 16 * weights)


def wavefront(G: int, m: int, c: float, h: float, *, overlapped: bool = False) -> float:
    """Seconds from the first microbatch on the first device to the last on the last: ticks of c, hand-overs of h.

    `overlapped`, as in `simulate`: only the G - 1 hand-overs on the way of the first microbatch are waited for.
    """
    waits = G - 1 if overlapped or G == 1 else m + G - 2
    return (m + G - 1) * c + waits * h


def best_devices(Ts: float, Tc: float, microbatches: float = math.inf) -> float:
    """The G that minimises the wavefront: sqrt((1 - 1/m) Ts / Tc)."""
    return math.sqrt((1 - 1 / microbatches) * Ts / Tc)


def hand_over(size: float, machine: Machine, devices: int) -> float:
    """To a neighbour; as slow as the slowest, which is between hosts if there are several."""
    if devices <= machine.per_host:
        return machine.latency + size / machine.link
    return machine.network_latency + size / machine.network


def all_reduce(size: float, devices: int, machine: Machine) -> float:
    """In each host a ring or a tree, whichever is faster; between hosts a tree for each device's share."""
    local = min(devices, machine.per_host)
    hosts = math.ceil(devices / local)
    ring = 2 * (local - 1) * (machine.latency + size / local / machine.link)
    tree = 2 * math.log2(local) * machine.latency + 2 * size / machine.link
    seconds = min(ring, tree) if local > 1 else 0.0
    if hosts > 1:
        share = size / local * (hosts - 1) / hosts
        seconds += 2 * math.log2(hosts) * machine.network_latency + 2 * share / machine.network
    return seconds


def simulate(
    G: int, m: int, compute: Callable[[int, int], float], hand: Callable[[int, int], float], *, overlapped: bool = False
) -> float:
    """The wavefront event by event: seconds until the last device has ended.

    compute(g, k) is what tick k takes on device g (bubbles too), hand(g, k) the way of its state to g + 1. `ppermute` in
    a loop is a rendezvous: device g ends its exchange of tick k when both neighbours have ended tick k and the states
    have passed. `overlapped`: sending costs the sender nothing, and a device waits for what it receives alone.
    """
    ready = [0.0] * G
    for k in range(m + G - 1):
        ended = [ready[g] + compute(g, k) for g in range(G)]
        if k == m + G - 2:
            return max(ended)
        ready = [
            max(
                ended[g],
                ended[g - 1] + hand(g - 1, k) if g else 0.0,
                max(ended[g], ended[g + 1]) + hand(g, k) if g < G - 1 and not overlapped else 0.0,
                ended[g] + hand(g - 1, k) if g and not overlapped else 0.0,
            )
            for g in range(G)
        ]


def _divisors(n: int, most: int) -> list[int]:
    return [d for d in range(1, min(n, most) + 1) if n % d == 0]
