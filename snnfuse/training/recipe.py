"""Pieces of training recipes: groups of parameters for optax, an average of the weights, losses of time steps and of rates."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

from snnfuse.nn.padded import Padded, real_steps, split
from snnfuse.nn.spiking import Spiking

NORMS = (nnx.BatchNorm, nnx.LayerNorm, nnx.GroupNorm, nnx.InstanceNorm, nnx.RMSNorm)  # ours are among them


def parameter_groups(model: nnx.Module) -> nnx.State:
    """The group of every `nnx.Param` of the model: "neuron", "norm", "bias" or "weight".

    Parameters of a `nn.Spiking` are "neuron", and so are parameters with the names raw_delay (learned delays) and threshold
    (`nn.PSN`). Scale and bias of a normalisation are "norm"; other parameters are "bias" if that is their name, else "weight".
    The result has the structure of `nnx.state(model, nnx.Param)`, as optax wants it:

        groups = training.parameter_groups(model)
        decayed = jax.tree.map(lambda group: group == "weight", groups)
        optax.adamw(1e-3, weight_decay=1e-2, mask=decayed)                                    # weights alone decay
        optax.multi_transform({"neuron": optax.adam(1e-2), "norm": ..., "bias": ..., "weight": ...}, groups)
    """
    owners = dict(nnx.iter_modules(model))

    def group(path):
        owner = owners.get(path[:-1])
        if isinstance(owner, Spiking) or path[-1] in ("raw_delay", "threshold"):
            return "neuron"
        if isinstance(owner, NORMS):
            return "norm"
        return "bias" if path[-1] == "bias" else "weight"

    return nnx.from_flat_state([(path, group(path)) for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))])


def update_average(average: nnx.Module, model: nnx.Module, decay: float | Array) -> None:
    """Moves `average`, a model of the same structure, towards `model`: an exponential moving average of its parameters.

        average = decay average + (1 - decay) model

    Other variables (running statistics, seeds) are copied. Call it inside of the compiled step, after `optimizer.update`,
    and evaluate `average`. `decay` is in [0, 1); a schedule may give it. Raises ValueError if the structures differ.
    Polyak and Juditsky 1992; Tarvainen and Valpola 2017, https://arxiv.org/abs/1703.01780.
    """
    if not isinstance(decay, jax.Array) and not 0 <= decay < 1:
        raise ValueError(f"decay must be in [0, 1); got {decay}")
    ours, theirs = (dict(nnx.to_flat_state(nnx.state(m))) for m in (average, model))
    shapes = [{path: jnp.shape(v[...]) for path, v in state.items()} for state in (ours, theirs)]
    if shapes[0] != shapes[1]:
        differ = sorted(map(str, shapes[0].items() ^ shapes[1].items()))
        raise ValueError(f"average must have the variables of model; these differ: {', '.join(differ[:4])}")

    def moved(old, new):  # a schedule's float32 must not widen weights of 16 bits
        return new.replace((decay * old[...] + (1 - decay) * new[...]).astype(old[...].dtype))

    variables = [(path, v) for path, v in theirs.items() if isinstance(v, nnx.Variable)]  # other arrays are constants
    moved = [(path, moved(ours[path], v) if isinstance(v, nnx.Param) else v) for path, v in variables]
    nnx.update(average, nnx.from_flat_state(moved))


def temporal_cross_entropy(
    outs: Array | Padded, targets: Array, *, mse: float = 0.0, level: float = 1.0, lengths: Array | None = None
) -> Array:
    """The TET loss: the cross-entropy of every step's output, not of their mean; a number, float32 at least.

        L = (1 - mse) mean_t CE(outs[t], targets) + mse mean (outs - level)^2

    Args:
      outs: [T, B, classes], floating, or `nn.Padded`: membranes of a readout, or other logits at every step.
      targets: [B] integer classes, or [B, classes] probabilities, as of label smoothing or mixup.
      mse: in [0, 1], the share of the second term, which keeps outputs from growing; 0 by default, 0.05 in the paper on CIFAR-10.
      level: what the second term draws outputs to, 1.0 by default, the threshold.
      lengths: [B], the numbers of steps of sequences that end before T; the means are then over t before the end of each
        sequence, and over sequences. A length of 0 raises ValueError; inside of `jit` the loss is then NaN.

    Deng et al. 2022, "Temporal efficient training", https://arxiv.org/abs/2202.11946. Errors: ValueError for other shapes
    and for mse outside of [0, 1].
    """
    if not 0 <= mse <= 1:
        raise ValueError(f"mse must be in [0, 1]; got {mse}")
    outs, lengths = split(outs, lengths)
    if outs.ndim != 3 or not jnp.issubdtype(outs.dtype, jnp.floating):
        raise ValueError(f"outs must be [T, B, classes], floating; got {outs.dtype} of shape {outs.shape}")
    if jnp.issubdtype(targets.dtype, jnp.integer) and targets.shape == outs.shape[1:2]:
        targets = jax.nn.one_hot(targets, outs.shape[-1])
    elif targets.shape != outs.shape[1:] or not jnp.issubdtype(targets.dtype, jnp.floating):
        raise ValueError(
            f"targets must be [B] integer classes or [B, classes] probabilities, for outs {outs.shape}; "
            f"got {targets.dtype} of shape {targets.shape}"
        )
    outs = outs.astype(jnp.promote_types(outs.dtype, jnp.float32))
    if (real := real_steps(lengths, outs.shape)) is not None:
        outs = jnp.where(real, outs, 0)  # what follows the end may be infinite
    entropy = optax.softmax_cross_entropy(outs, jnp.broadcast_to(targets, outs.shape))
    losses = (1 - mse) * entropy + mse * jnp.square(outs - level).mean(-1)
    return losses.mean() if real is None else (jnp.where(real[..., 0], losses, 0).sum(0) / real.sum((0, 2))).mean()


def rate_penalty(
    counts: dict[str, Array], steps: int, *, lower: float = 0.0, upper: float = 1.0, per: str = "neuron"
) -> Array:
    """How far the firing rates of layers leave the band from `lower` to `upper`: a float32 number, 0 inside of it.

        L = mean over layers of mean_n (max(0, r[n] - upper)^2 + max(0, lower - r[n])^2);   r = mean of counts / steps

    Only `upper` makes a network sparse, only `lower` keeps neurons from falling silent; both together are a band. The counts come
    from the run that is trained, and no spike is stored for them:

        with monitor.watch(model, what="counts") as counts:
            outs, state = model(xs)
        loss = cross_entropy + 0.1 * training.rate_penalty(counts, len(xs), upper=0.2)

    Args:
      counts: {name: spikes of each neuron over the sequence, [B, *space, N]}, as `snnfuse.nn.monitor.watch` gives them. A
        dictionary of some layers only, or one call for each layer, gives layers bands of their own.
      steps: T.
      lower, upper: rates in spikes a step, 0 <= lower <= upper.
      per: whose rates are meant. "neuron": r is the mean over the batch; "channel": over batch and space, one r for each of
        N; "layer": over all neurons of a layer.

    Raises ValueError for other bounds, for no layers, and for another `per`.
    """
    traced = any(isinstance(bound, jax.core.Tracer) for bound in (lower, upper))  # these have no value to look at
    if not traced and not 0 <= lower <= upper:
        raise ValueError(f"lower and upper must be 0 <= lower <= upper; got {lower} and {upper}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1; got {steps}")
    if not counts:
        raise ValueError("counts must have at least one layer; got none")
    losses = []
    for name, count in counts.items():
        if count.ndim < 2:
            raise ValueError(f"counts of {name!r} must be [B, *space, N]; got shape {count.shape}")
        axes = {"neuron": (0,), "channel": tuple(range(count.ndim - 1)), "layer": None}
        if per not in axes:
            raise ValueError(f"per must be one of {', '.join(axes)}; got {per!r}")
        rate = count.mean(axes[per], dtype=jnp.float32) / steps
        losses.append(jnp.mean(jnp.square(jnp.maximum(rate - upper, 0)) + jnp.square(jnp.maximum(lower - rate, 0))))
    return sum(losses) / len(losses)
