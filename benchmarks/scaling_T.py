"""The idealised study of the temporal fusion paper (arXiv 2408.00280): a layer of LIF neurons alone, T from 4 to 512.

    python benchmarks/scaling_T.py                                              minutes on a GPU
    python benchmarks/scaling_T.py --T 4 --neurons 256 --implementations scan,interpret     a check anywhere

Forward and backward of N neurons by `lax.scan` and by each fused implementation, on random input. Rows go to
results/scaling_T.jsonl: `ms` inside a program, `call_ms` as a user calls it, `over_scan` the speed-up.
"""

import argparse
import sys
from functools import partial

import jax
import jax.numpy as jnp
from measure import device_ms, fwd_bwd, record, time_ms

import snnfuse as sf

NEURON = sf.LIF(reset=sf.HardReset(), surrogate=sf.Rectangle())  # the paper's, of decay 0.2 and threshold 0.3
PARAMS = sf.LIFParams(0.2, 0.3)
BYTES = 2**31  # at most, of the different inputs of one program


def row(T: int, N: int, implementation: str, scan_ms: float | None) -> dict:
    layer = fwd_bwd(partial(_spikes, implementation))
    count = max(1, min(8, BYTES // (4 * T * N)))
    draw = lambda seed: jax.random.normal(jax.random.key(seed), (T, N), jnp.float32)
    sets = [((draw(2 * i) * 0.5,), draw(2 * i + 1)) for i in range(count)]
    spikes, _ = layer(*sets[0])
    ms, low, high = device_ms(layer, sets)
    return dict(
        firing_rate=float(spikes.mean()),
        ms=ms,
        quartiles=(low, high),
        call_ms=time_ms(layer, *sets[0])[0],
        over_scan=None if scan_ms is None else scan_ms / ms,
        status="ok",
    )


def _spikes(implementation, xs):
    return sf.unroll(NEURON, PARAMS, None, xs, implementation=implementation)[0]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--T", default="4,8,16,32,64,128,256,512")
    parser.add_argument("--neurons", type=int, default=2**20)
    parser.add_argument("--implementations", default="scan,pallas,mosaic,triton", help="scan first, to compare with")
    options = parser.parse_args(argv)
    for T in map(int, options.T.split(",")):
        scan_ms = None
        for implementation in options.implementations.split(","):
            about = dict(case="lif", T=T, N=options.neurons, implementation=implementation, input="random input")
            try:
                about |= row(T, options.neurons, implementation, scan_ms)
                scan_ms = about["ms"] if implementation == "scan" else scan_ms
            except Exception as e:  # a failure is a row
                about |= dict(status=repr(e)[:300])
            record("scaling_T", **about)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
