"""Networks built of `snnfuse.nn`."""

from snnfuse.models.resnet import Residual, paper_lif, sew_resnet, spiking_resnet
from snnfuse.models.torch_names import load_torch, to_torch, torch_variables

__all__ = ["Residual", "load_torch", "paper_lif", "sew_resnet", "spiking_resnet", "to_torch", "torch_variables"]
