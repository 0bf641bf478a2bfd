"""Parameters under PyTorch's names and in its layouts, as in torchvision's ResNets and SpikingJelly's spiking ResNets."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from snnfuse import nn
from snnfuse.models.resnet import MembraneResidual, Residual


def load_torch(model: nn.Sequential, state_dict: Mapping[str, Any]) -> None:
    """Fill a model made by `spiking_resnet`, in place, from a PyTorch state dict (arrays, or CPU tensors).

    Raises ValueError and does not change the model if a name is missing or unknown, or if a shape differs.
    """
    if not any(isinstance(layer, (Residual, MembraneResidual)) for layer in _layers(model)):
        raise ValueError(f"model must be made by spiking_resnet; got {type(model).__name__} without residual blocks")
    given = {name: np.asarray(value) for name, value in state_dict.items() if not name.endswith("num_batches_tracked")}
    wanted = dict(torch_variables(model))
    if wrong := sorted(set(given) ^ set(wanted)):
        raise ValueError(
            f"state_dict must have the names of the model; missing or unknown: {', '.join(wrong[:5])}"
            + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        )
    values = {}
    for name, variable in wanted.items():
        values[name] = from_torch(given[name])
        if values[name].shape != variable[...].shape:
            raise ValueError(f"state_dict[{name!r}] must be {to_torch(variable[...]).shape}; got {given[name].shape}")
    for name, variable in wanted.items():
        variable[...] = jnp.asarray(values[name], variable[...].dtype)


def torch_variables(model: nn.Sequential) -> Iterator[tuple[str, nnx.Variable]]:
    """(PyTorch's name, variable) for all parameters and running averages of a model made by `spiking_resnet`."""
    stem, *layers = _layers(model)
    if any(isinstance(layer, MembraneResidual) for layer in layers):
        raise ValueError("model must not have connect='membrane'; its layers have no names in PyTorch's ResNets")
    if any(isinstance(layer, nn.Linear) for layer in layers[:-1]):
        raise ValueError(
            "model must be a ResNet-18, -34 or -50; the hidden layer of a ResNet-19 has no name in PyTorch"
        )
    yield from _conv_norm("conv1", "bn1", *stem.layers[:2])
    stage, index, blocks = 0, 0, [block for block in layers if isinstance(block, Residual)]
    width = None
    for block in blocks:
        convs = [layer for layer in block.main.layers if isinstance(layer, nn.Conv)]
        spiking = [layer for layer in block.main.layers if isinstance(layer, nn.NormSpiking)] + [block.join]
        stage, index = (stage, index + 1) if convs[0].kernel.shape[-1] == width else (stage + 1, 0)
        width = convs[0].kernel.shape[-1]
        for i, (conv, norm) in enumerate(zip(convs, spiking, strict=True), 1):
            yield from _conv_norm(f"layer{stage}.{index}.conv{i}", f"layer{stage}.{index}.bn{i}", conv, norm)
        if block.shortcut is not None:
            conv, *norm = block.shortcut.layers
            norm = norm[0].norm if norm else block.join.shortcut_norm
            yield from _conv_norm(
                f"layer{stage}.{index}.downsample.0", f"layer{stage}.{index}.downsample.1", conv, norm
            )
    yield "fc.weight", layers[-1].kernel
    yield "fc.bias", layers[-1].bias


def _layers(model):
    return [getattr(layer, "layer", layer) for layer in model.layers]


def _conv_norm(conv_name, norm_name, conv, norm):
    norm = norm.norm if isinstance(norm, nn.NormSpiking) else norm
    yield f"{conv_name}.weight", conv.kernel
    yield f"{norm_name}.weight", norm.scale
    yield f"{norm_name}.bias", norm.bias
    yield f"{norm_name}.running_mean", norm.mean
    yield f"{norm_name}.running_var", norm.var


def from_torch(value: np.ndarray) -> np.ndarray:
    """OIHW to HWIO, and a dense [O, I] to [I, O]."""
    return {4: lambda v: v.transpose(2, 3, 1, 0), 2: lambda v: v.T}.get(value.ndim, lambda v: v)(value)


def to_torch(value: np.ndarray) -> np.ndarray:
    """The inverse of `from_torch`, for a parameter or its gradient."""
    return {4: lambda v: v.transpose(3, 2, 0, 1), 2: lambda v: v.T}.get(value.ndim, lambda v: v)(value)
