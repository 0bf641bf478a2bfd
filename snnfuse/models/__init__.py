"""Networks built of `snnfuse.nn`."""

from snnfuse.models.resnet import MembraneResidual, Residual, paper_lif, sew_resnet, spiking_resnet
from snnfuse.models.torch_names import load_torch, to_torch, torch_variables
from snnfuse.models.transformer import SelfAttention, TokenAttention, qkformer, spikformer, spikformer_lif
from snnfuse.models.vgg import spiking_vgg

__all__ = [
    "MembraneResidual",
    "Residual",
    "SelfAttention",
    "TokenAttention",
    "load_torch",
    "paper_lif",
    "qkformer",
    "sew_resnet",
    "spikformer",
    "spikformer_lif",
    "spiking_resnet",
    "spiking_vgg",
    "to_torch",
    "torch_variables",
]
