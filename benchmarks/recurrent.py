"""How long does a recurrent layer take, beside `lax.scan` and beside cuDNN's recurrent networks?

    python benchmarks/recurrent.py --jobs 10      on a GPU, about four minutes; rows go to results/recurrent.jsonl

One layer s[t] = LIF(x[t] + s[t-1] @ W), forward and backward, with the gradients of x and W, in bfloat16, W rounded to bfloat16:
"triton" is the fused kernel, "scan" `jax.lax.scan`, "unroll=8" the same loop written by hand with eight steps in an iteration.
cuDNN's RNN (tanh) and LSTM, called through PyTorch, are no spiking layers and compute the product with their input too; they say
what a vendor's library needs for a layer of this size. `ms` is device time: of a jitted loop over three sets of arrays, or of a
CUDA graph. `precision`: how the weight is multiplied. `peak_mb` is the memory that forward and backward hold, with x and d_out.
"""

from functools import partial

import jax
import jax.numpy as jnp
from runner import Case, job, main, question
from with_jax import bf16, compiled, device_ms, f32, forward_backward, largest_error, repeated

import snnfuse as sf

SHAPES = [(256, 256, 128), (256, 256, 256), (1000, 64, 128), (250, 256, 512), (250, 256, 1024), (250, 64, 1024)]
SETS = 3
NEURONS = {
    "LIF": (sf.LIF(), sf.LIFParams(0.9, 1.0)),
    "adaptive LIF": (sf.AdaptiveLIF(), sf.AdaptiveLIFParams(0.9, 0.95, 0.2, 1.0)),
}


@question("recurrent")
def recurrent(args):
    for T, B, H in [(8, 4, 32)] if args.tiny else SHAPES:
        key = dict(T=T, B=B, size=H)
        exact = [] if args.tiny else ["bfloat16", "bfloat16x2", "float32"][: 3 if H <= 512 else 2]
        ways = [*(("triton", precision) for precision in exact), ("scan", "bfloat16"), ("unroll=8", "bfloat16")]
        for name in NEURONS:
            for way, precision in ways if name == "LIF" else ways[:1]:
                named = dict(case=name, implementation=way, dtype="bfloat16", note=precision)
                yield Case(named | key, measure, (name, way, precision, T, B, H), job(args))
        if not args.tiny:
            for kind, dtype in (("RNN", "float16"), ("RNN", "tf32"), ("LSTM", "float16")):
                named = dict(case=f"cuDNN {kind}", library="torch", dtype=dtype)
                yield Case(named | key, cudnn, (kind, dtype, T, B, H), "torch")


def inputs(T, B, H, seed):
    keys = jax.random.split(jax.random.key(seed), 3)
    most = min(256, int(512 / H**0.5))
    x = (0.5 * jax.random.normal(keys[0], (T, B, H)) + 0.15).astype(bf16)
    weight = jax.random.randint(keys[1], (H, H), -most, most + 1) / f32(1024)
    return (x, weight), jax.random.normal(keys[2], (T, B, H)).astype(bf16)


def unrolled(neuron, params, weight, x):
    weight = weight.astype(bf16)

    def body(carry, x):
        state, s = carry
        back = jnp.dot(s, weight, preferred_element_type=f32)
        state, s = neuron.step(params, state, x.astype(f32) + back)
        s = s.astype(bf16)
        return (state, s), s

    first = neuron.init_state(x.shape[1:]), jnp.zeros(x.shape[1:], bf16)
    return jax.lax.scan(body, first, x, unroll=8)[1]


def layer(name, way, precision, x, weight):
    neuron, params = NEURONS[name]
    if way == "unroll=8":
        return unrolled(neuron, params, weight, x)
    options = dict(precision=precision, implementation=way)
    return sf.unroll_recurrent(neuron, params, None, x, weight, **options)[0]


def measure(name, way, precision, T, B, H):
    both, reference = (forward_backward(partial(layer, name, how, precision)) for how in (way, "scan"))
    drawn = jax.jit(partial(inputs, T, B, H))
    shapes = jax.eval_shape(drawn, 0)
    program, row = compiled(both, *shapes)
    wanted, _ = compiled(reference, *shapes)
    forward = lambda args, _: layer(name, way, precision, *args)
    timed = [repeated(f, [shapes] * SETS) for f in (both, forward)]
    results = jax.eval_shape(both, *shapes)
    agree, _ = compiled(jax.jit(agreement), results, results)
    drawn = drawn.lower(0).compile()
    yield
    sets = [drawn(seed) for seed in range(SETS)]
    row |= {key: value.item() for key, value in agree(program(*sets[0]), wanted(*sets[0])).items()}
    (ms, *quartiles), (forward_ms, *_) = (device_ms(program, sets) for program in timed)
    yield row | dict(ms=ms, quartiles=quartiles, forward_ms=forward_ms, us_per_step=1e3 * ms / T)


def agreement(found, wanted):
    (out, gradients), (want, want_gradients) = found, wanted
    row = dict(firing_rate=out.mean(dtype=f32), flips=(out != want).sum())
    return row | dict(gradient_error=largest_error(gradients, want_gradients))


def cudnn(kind, dtype, T, B, H):
    import with_torch
    from with_torch import ON, torch

    kept = torch.float16 if dtype == "float16" else torch.float32
    rnn = getattr(torch.nn, kind)(H, H).to(ON, kept)
    x = torch.randn(T, B, H, device=ON, dtype=kept, requires_grad=True)
    d_out = torch.randn(T, B, H, device=ON, dtype=kept)

    def run():
        rnn.zero_grad()
        x.grad = None
        rnn(x)[0].backward(d_out)

    run()
    with_torch.sync()
    yield
    yield with_torch.measure(run, [()])


if __name__ == "__main__":
    main(__doc__, "recurrent")
