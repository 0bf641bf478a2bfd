"""How a library on PyTorch is checked and timed: `ms` of a CUDA graph of its calls replayed, `call_ms` of calls as written.

Where a graph cannot be captured, `ms` is what CUDA events say of the calls, and `graph` says why.
"""

import gc
import time

import numpy as np
import torch
import torch.nn.functional as F

from adapters import cases

CUDA = torch.cuda.is_available()
ON = torch.device("cuda" if CUDA else "cpu")
DEVICE = torch.cuda.get_device_name() if CUDA else "cpu"
torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
torch.backends.cudnn.benchmark = True


def versions(library):
    return dict(torch=torch.__version__)


def run(adapter, case, dtype, way, reference):
    """The measured part of a row."""
    try:
        return KINDS[case.kind](adapter, case, dtype, way, reference)
    finally:  # the memory is the next library's
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()


def on(array, dtype=torch.float32):
    return torch.from_numpy(np.ascontiguousarray(array)).to(ON).to(dtype)


def lif(adapter, case, dtype, way, reference):
    x, cotangent = (on(a, getattr(torch, dtype)) for a in cases.lif_tensors(case))
    f = adapter.lif(way, dtype)

    def call(x, cotangent):
        out = f(x)
        return out, torch.autograd.grad(out, x, cotangent.to(out.dtype))[0]

    x.requires_grad_()
    (spikes, gradient), row = first(call, x, cotangent)
    row |= compare(case, dtype, spikes, gradient, reference)
    del spikes, gradient
    if "status" in row:
        return row
    sets = [(x.detach().roll(i, -1).requires_grad_(), cotangent.roll(-i, -1)) for i in range(2)]
    return row | times(call, sets, no_graph(adapter))


def linear(adapter, case, dtype, way, reference):
    x, weight, cotangent = map(on, cases.linear_tensors(case))
    f = adapter.lif(way, "float32")
    weight.requires_grad_()

    def call(x, cotangent):
        out = f(x @ weight)
        return out, torch.autograd.grad(out, weight, cotangent)[0]

    (spikes, _), row = first(call, x, cotangent)
    row |= compare(case, dtype, spikes, None, reference)
    del spikes, _
    if "status" in row:
        return row
    return row | times(call, [(x, cotangent), (x.roll(1, -1), cotangent)], no_graph(adapter))


def shd(adapter, case, dtype, way, reference):
    xs, labels, *weights = cases.shd_tensors(case)
    xs, labels = on(xs), torch.from_numpy(labels).to(ON)
    weights = [on(w).requires_grad_() for w in weights]
    hidden, readout = adapter.lif(way, "float32"), adapter.readout(way)
    adam = torch.optim.Adam(weights, 1e-3, fused=True, capturable=CUDA)

    def loss_of(xs, labels):
        spikes = hidden(xs @ weights[0])
        return F.cross_entropy(readout(spikes @ weights[1]).mean(0), labels), spikes

    with torch.no_grad():
        loss, spikes = loss_of(xs, labels)
        row = compare(case, dtype, spikes, None, reference, loss)
    if "status" in row:
        return row

    def step(xs, labels):
        adam.zero_grad(set_to_none=True)
        loss, _ = loss_of(xs, labels)
        loss.backward()
        adam.step()
        return loss.detach()

    _, measured = first(step, xs, labels)
    return row | measured | times(step, [(xs, labels), (xs.roll(1, 1), labels)], no_graph(adapter))


def resnet(adapter, case, dtype, way, reference):
    from adapters import torch_resnet

    step, xs, labels = torch_resnet.training(adapter, way, dtype, *case.shape, ON)
    loss, row = first(step, xs, labels)
    return (
        row
        | dict(loss=float(loss))
        | times(step, [(xs, labels)], "not tried: a failed capture leaves PyTorch unusable")
    )


KINDS = dict(lif=lif, linear=linear, shd=shd, resnet=resnet)


def compare(case, dtype, spikes, gradient, reference, loss=None):
    gradient = None if gradient is None else gradient.float().cpu().numpy()
    return cases.compare(case, dtype, (spikes.detach() != 0).cpu().numpy(), gradient, reference, loss)


def sync():
    if CUDA:
        torch.cuda.synchronize()


def first(f, *args):
    """(result, how long the first call took and how much memory the second held at most)"""
    start = time.perf_counter()
    out = f(*args)
    sync()
    took = time.perf_counter() - start
    if not CUDA:
        return out, dict(first_call_s=took)
    del out
    torch.cuda.reset_peak_memory_stats()
    out = f(*args)
    sync()
    return out, dict(first_call_s=took, peak_mb=torch.cuda.max_memory_allocated() / 1e6)


def no_graph(adapter):
    """Why none is captured, or ""."""
    return getattr(adapter, "NO_GRAPH", "") if CUDA else "no GPU"


def times(f, sets, no_graph):
    start = time.perf_counter()
    f(*sets[0])
    sync()
    if time.perf_counter() - start > 5e-3:  # then what a cache holds of one set is nothing to the next call
        sets = sets[:1]
    call_ms = quartiles(lambda: f(*sets[0]))
    if not no_graph:
        try:
            ms = tuple(t / len(sets) for t in quartiles(graph(f, sets).replay))
            return dict(ms=ms[0], quartiles=ms[1:], call_ms=call_ms[0])
        except Exception as e:
            torch.cuda.synchronize()
            no_graph = repr(e)[:200]
    # the events say what the device took, host and all
    ms = quartiles(lambda: f(*sets[0]), events=True) if CUDA else call_ms
    return dict(ms=ms[0], quartiles=ms[1:], call_ms=call_ms[0], graph=no_graph)


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


def quartiles(f, repeats=7, seconds=0.05, events=False):
    """As `measure.time_ms`: (median, lower quartile, upper quartile) of milliseconds a call."""
    f()
    sync()
    start = time.perf_counter()
    f()
    sync()
    once = time.perf_counter() - start
    calls = max(1 if once > 0.1 else 3, int(seconds / once))
    samples = []
    for _ in range(repeats):
        if events:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
        start = time.perf_counter()
        for _ in range(calls):
            f()
        if events:
            end.record()
        sync()
        took = begin.elapsed_time(end) if events else (time.perf_counter() - start) * 1e3
        samples.append(took / calls)
    return tuple(float(q) for q in np.quantile(samples, (0.5, 0.25, 0.75)))
