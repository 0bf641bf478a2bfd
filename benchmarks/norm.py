"""What does it gain to normalise inside the neuron's kernels, beside an equally fused LIF layer behind the normalisation?

    python benchmarks/norm.py        seconds on a GPU; rows go to results/norm.jsonl

"unfused" is `nn.BatchNorm`, then `nn.LIF`: the normalised current is stored, and the neuron's kernels read it. "fused" is
`nn.NormSpiking`: the kernels take a scale and a shift. Rows named "two passes" are of an experiment that is not in the
library (commit edfe6a7): it ran the backward kernel twice instead of adding what the batch statistics contribute in a pass
of its own, and took 4 to 8 % less time than "fused".

`gradient_error` is the largest error against "unfused", divided by the largest gradient. A membrane on the other side of the
threshold, or of an edge of the surrogate's window, gives an error of its own size there. In 16 bits "unfused" rounds the
current, which changes some spikes. `gradient_error_of_most` leaves out one gradient in 10,000.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from runner import Case, main, question
from with_jax import bf16, device_ms, f32

import snnfuse as sf
from snnfuse import nn


@question("norm")
def norm(args):
    for M, C in ((40, 8),) if args.tiny else ((1254400, 64), (313600, 64), (102400, 256)):
        for dtype in (bf16, f32):
            for way in ("unfused", "fused"):
                key = dict(case=way, T=8 if args.tiny else 32, M=M, C=C, dtype=jnp.dtype(dtype).name)
                yield Case(key, measure, (way, key["T"], M, C, dtype, args.tiny))


def layer(way, implementation, x, gain, bias):
    neuron = nn.LIF(decay=0.2, threshold=0.3, surrogate=sf.Rectangle(), implementation=implementation)
    norm = nn.BatchNorm(len(gain), rngs=nnx.Rngs(0))
    norm.scale[...], norm.bias[...] = gain, bias
    if way == "fused":
        return nn.NormSpiking(neuron, norm)(x)[0]
    return neuron(jax.lax.optimization_barrier(norm(x)))[0]


def measure(way, T, M, C, dtype, tiny):
    def both(way):
        def run(x, gain, bias, d_out):
            out, vjp = jax.vjp(partial(layer, way, "interpret" if tiny else "pallas"), x, gain, bias)
            return out, vjp(d_out)

        return run

    draw = lambda seed: jax.random.normal(jax.random.key(seed), (T, M // C, C)).astype(dtype)
    sets = [(draw(2 * i), jnp.linspace(0.5, 1, C), jnp.linspace(-0.1, 0.1, C), draw(2 * i + 1)) for i in range(3)]
    want, got = (jax.jit(both(w))(*sets[0]) for w in ("unfused", way))
    large = lambda a: jnp.abs(a.astype(f32)).max()
    far = jnp.abs((got[1][0] - want[1][0]).astype(f32)).ravel()[: 2**24]
    ms, *quartiles = device_ms(both(way), sets)
    return dict(
        ms=ms,
        quartiles=quartiles,
        flips=int((got[0] != want[0]).sum()),
        gradient_error=max(float(large(a - b) / large(b)) for a, b in zip(got[1], want[1], strict=True)),
        gradient_error_of_most=float(jnp.quantile(far, 0.9999) / large(want[1][0])),
    )


if __name__ == "__main__":
    main(__doc__, "norm")
