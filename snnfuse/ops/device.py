"""The device that the code being traced is for."""

import jax


def platform() -> str:
    """'gpu' or 'cpu' (or 'tpu'): of the abstract mesh in scope if it names a device, else of JAX's default device."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if device is None:
        device = jax.config.jax_default_device or jax.devices()[0]
    return device if isinstance(device, str) else device.platform
