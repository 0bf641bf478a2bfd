"""Training steps: `nnx.jit`'s way of writing one, at the cost of a call to a flat `jax.jit`; batches that live on the device;
checkpoints; groups of parameters, averages of weights, and the loss of every time step.

    @training.compiled_step
    def train_step(model, optimizer, xs, labels):
        loss, grads = nnx.value_and_grad(loss_of)(model, xs, labels)
        optimizer.update(model, grads)
        return loss

    loss = train_step(model, optimizer, xs, labels)              # one step
    losses = train_step.scan(model, optimizer, xs_K, labels_K)   # K steps in one call: xs_K [K, ...], losses [K]

After each call the model and the optimizer hold the new arrays: read, print, save and evaluate them at any time.

    training.save(path, model, optimizer)      # the arrays, and the numbers that are compiled in
    training.restore(path, model, optimizer)   # refuses a network with other numbers
"""

from snnfuse.training.checkpoint import compare_settings, from_arrays, restore, save, settings, to_arrays
from snnfuse.training.compiled import CompiledStep, compiled_step
from snnfuse.training.device_data import DeviceData
from snnfuse.training.recipe import parameter_groups, rate_penalty, temporal_cross_entropy, update_average

__all__ = [
    "CompiledStep",
    "DeviceData",
    "compare_settings",
    "compiled_step",
    "from_arrays",
    "parameter_groups",
    "restore",
    "save",
    "settings",
    "rate_penalty",
    "temporal_cross_entropy",
    "to_arrays",
    "update_average",
]
