"""Data: encoders (JAX alone), and with the extra `data` the builders, the loader and `python -m snnfuse.data`."""

from snnfuse.data import encoders

__all__ = ["encoders"]
