"""The device that the code being traced is for."""

import jax


def _device():
    """The device of the abstract mesh in scope if it names one, else JAX's default device."""
    abstract = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return abstract or jax.config.jax_default_device or jax.devices()[0]


def platform() -> str:
    """'gpu' or 'cpu' (or 'tpu')."""
    device = _device()
    return device if isinstance(device, str) else device.platform


def kind() -> str:
    """The name of the device, such as 'NVIDIA H100 80GB HBM3'."""
    device = _device()
    return device if isinstance(device, str) else device.device_kind


def device_count() -> int:
    """How many devices an array may be spread over: all devices of the abstract mesh in scope, or else of JAX."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.device_count() if getattr(mesh, "abstract_device", None) is None else mesh.size


# An abstract device does not know its compute capability.
_CAPABILITIES = {"A100": 8.0, "RTX 30": 8.6, "RTX 40": 8.9, "L4": 8.9, "H100": 9.0, "H200": 9.0, "B200": 10.0}


def compute_capability() -> float:
    """The compute capability of the GPU, such as 9.0, or 0.0 if it is not known."""
    device = _device()
    if (capability := getattr(device, "compute_capability", None)) is not None:
        return float(capability)
    return next((c for name, c in _CAPABILITIES.items() if name in getattr(device, "device_kind", "")), 0.0)


# An abstract device does not say. Of several models with one name, this is the smallest.
_MULTIPROCESSORS = {"A100": 108, "H100": 114, "H200": 132, "B200": 148}


def multiprocessors() -> int:
    """How many multiprocessors the GPU has; for a device that is not known, as many as an H100."""
    device = _device()
    if (count := getattr(device, "core_count", None)) is not None and platform() == "gpu":
        return int(count)
    return next((n for name, n in _MULTIPROCESSORS.items() if name in getattr(device, "device_kind", "")), 132)
