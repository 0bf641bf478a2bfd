"""Predict the time of a training step on a mesh: data parallel, time over devices, or both.

The predicted time of a step on D x G devices (D along data, G along time) is the sum of

    dense       3 flops / rate; each device does 1 / (D G) of the work, once forward and twice that backward
    neurons     the rounds of each layer (below), forward and backward
    gradients   one all-reduce of the weights over all D G devices
    statistics  two small all-reduces for each normalised layer, if batch statistics are synchronised
    launches    the least time of a kernel, however small

in seconds. The model assumes that nothing overlaps, so a good schedule can be faster.

Compared with H100s (benchmarks/results/multi_gpu.jsonl; benchmarks/README.md has every error), a step of Spiking-ResNet-18
took 32 to 47 % less than predicted on one device and 28 to 30 % less on two, data parallel, so that the speed-up at a fixed
batch of 200 is predicted too high: 1.94x for 1.58x to 1.62x. Time over two devices took 5 to 10 % longer than predicted for
a stack of LIF layers of 512 steps and more, and 16 to 36 % less for that ResNet. With T = 32 both took about twice the
prediction: passing states on and launching kernels cost more than the model assumes.

The rounds (`snnfuse.parallel.time`). Let u be the time in which a device moves a layer's sequence of T steps once, and h
the time to pass a state on. Forward, G - 1 rounds read x, and one run reads x and writes s. Backward, one round reads x and
ds, G - 2 rounds read x, and one run reads both and writes dx. Each of them moves 1 / G of the sequence, and 2 (G - 1)
states are passed on:

    R(G) = (2 G + 4) u / G + 2 (G - 1) h        for G > 1; on one device 5 u

R is smallest at G = sqrt(2 u / h), and approaches 2 u with many devices. So the first gain is memory, 1 / G of it, and the
second is speed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Machine:
    """The rates of one device and of the links between devices, in bytes, flops and seconds.

    `link` and `latency` are those between the `per_host` devices of a host. `network`, the share of one device, and
    `network_latency` are those between hosts. `launch` is the least time of a kernel.
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
# reached in a prototype, far below the peak, and below what they reach now. link: sending 240 MB more added 0.70 ms, and
# 0.65 in a later run (multi_gpu.jsonl, hand-over, 16 and 256 MB; an all-reduce 0.94 ms, which is 2.7e11). latency: half an
# all-reduce inside a program, 34 in 0.60 ms (BatchNorm synchronised or not, 2026-11-24, commit 0855f02, whose rows are in
# the history); a call of one collective of 1 KB takes 0.13 to 0.23 ms, most of it the dispatch. network, its latency and launch: nominal or assumed.
H100 = Machine(
    memory=2.9e12, flops=1.4e14, link=3.6e11, latency=9e-6, network=4.0e10, network_latency=1.5e-5, capacity=80e9
)


class LayerCost(NamedTuple):
    """A connection, and the neurons behind it.

    `neurons` in one sample; forward `flops` of the connection for one sample and step; `weights`, its number of parameters;
    `state`, the number of float32 values that a neuron holds; `normalised`, whether batch statistics are computed.
    """

    neurons: int
    flops: float
    weights: int
    state: int = 1
    normalised: bool = True


@dataclass(frozen=True)
class Plan:
    """A mesh and the prediction for its step: seconds for each part, and bytes of memory on a device."""

    data: int
    time: int
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
            f"data={self.data},time={self.time}: {self.seconds * 1e3:.3f} ms "
            f"(dense {self.dense * 1e3:.3f}, neurons {self.neurons * 1e3:.3f}, gradients {self.gradients * 1e3:.3f}, "
            f"statistics {self.statistics * 1e3:.3f}), {self.bytes / 1e9:.2f} GB a device"
        )


def plan_meshes(
    layers: Sequence[LayerCost],
    T: int,
    batch: int,
    devices: int,
    machine: Machine = H100,
    *,
    itemsize: int = 2,
    synchronised: bool = False,
    exactly: bool = False,
) -> list[Plan]:
    """Rank the meshes of at most (or `exactly`) `devices` devices, the fastest first.

    Meshes must divide batch and T, and fit in memory. `itemsize` is the bytes of an activation. Batch statistics are always
    synchronised along a time axis, and along data if `synchronised`.
    """
    if min(T, batch, devices) < 1 or not layers:
        raise ValueError(f"T, batch and devices must be at least 1, of some layers; got {T}, {batch}, {devices}")
    plans = [
        predict(layers, T, batch, D, G, machine, itemsize=itemsize, synchronised=synchronised)
        for D in _divisors(batch, devices)
        for G in _divisors(T, devices // D)
        if not exactly or D * G == devices
    ]
    fit = [p for p in plans if p.bytes <= machine.capacity]
    if not fit:
        least = min(plans, key=lambda p: p.bytes, default=None)
        why = f"the smallest needs {least}" if least else f"none of {devices} divides batch and T"
        raise ValueError(f"no mesh of {devices} devices runs T={T}, batch={batch}: {why}")
    return sorted(fit, key=lambda p: (p.seconds, p.devices))


def predict(
    layers: Sequence[LayerCost],
    T: int,
    batch: int,
    data: int,
    time: int,
    machine: Machine = H100,
    *,
    itemsize: int = 2,
    synchronised: bool = False,
) -> Plan:
    """Predict the step on one mesh."""
    D, G, n = data, time, data * time
    steps = T * batch / n  # sample-steps a device
    dense = sum(max(3 * layer.flops * steps / machine.flops, 3 * machine.launch) for layer in layers)
    neurons = 0.0
    for layer in layers:
        unit = itemsize * layer.neurons * T * batch / D / machine.memory
        neurons += rounds(G, unit, machine.launch, hand_over(4 * layer.state * layer.neurons * batch / D, machine, n))
    weights = sum(layer.weights for layer in layers)
    normalised = [layer for layer in layers if layer.normalised]
    shared = (n if synchronised else G) if G > 1 or synchronised else 1
    statistics = 2 * len(normalised) * all_reduce(1e3, shared, machine)  # a few hundred channels: latency alone
    activations = (
        sum(2 * itemsize * layer.neurons for layer in layers) * steps
    )  # a layer's input current and its spikes
    return Plan(D, G, dense, neurons, all_reduce(4 * weights, n, machine), statistics, activations + 16 * weights)


def rounds(G: int, unit: float, launch: float, hand: float) -> float:
    """Seconds of a layer's neurons, forward and backward. A run takes at least `launch`; passing a state on takes `hand`."""
    runs = {1: 2 * G - 3, 2: 2, 3: 1} if G > 1 else {2: 1, 3: 1}  # {sequences moved: number of runs}
    return sum(n * max(moved * unit / G, launch) for moved, n in runs.items()) + 2 * (G - 1) * hand


def hand_over(size: float, machine: Machine, devices: int) -> float:
    """Seconds to send `size` bytes to a neighbour, over the slowest link: between hosts, if there are several."""
    if devices <= machine.per_host:
        return machine.latency + size / machine.link
    return machine.network_latency + size / machine.network


def all_reduce(size: float, devices: int, machine: Machine) -> float:
    """Seconds of an all-reduce. In a host: a ring or a tree, whichever is faster. Between hosts: a tree for each share."""
    local = min(devices, machine.per_host)
    hosts = math.ceil(devices / local)
    ring = 2 * (local - 1) * (machine.latency + size / local / machine.link)
    tree = 2 * math.log2(local) * machine.latency + 2 * size / machine.link
    seconds = min(ring, tree) if local > 1 else 0.0
    if hosts > 1:
        share = size / local * (hosts - 1) / hosts
        seconds += 2 * math.log2(hosts) * machine.network_latency + 2 * share / machine.network
    return seconds


def _divisors(n: int, most: int) -> list[int]:
    return [d for d in range(1, min(n, most) + 1) if n % d == 0]
