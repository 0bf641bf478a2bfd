"""The spiking ResNet-18 of the temporal fusion paper in PyTorch: `benchmarks/resnet.py` has ours."""

import torch
import torch.nn.functional as F
from torch import nn


class OverTime(nn.Module):
    """A neuron on [T, B, ...] within a network on [T * B, ...]."""

    def __init__(self, T, neuron):
        super().__init__()
        self.T, self.neuron = T, neuron

    def forward(self, x):
        return self.neuron(x.view(self.T, -1, *x.shape[1:])).flatten(0, 1)


class Block(nn.Module):
    def __init__(self, features, width, stride, neuron):
        super().__init__()
        self.conv1 = nn.Conv2d(features, width, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.neuron1, self.neuron2 = neuron(), neuron()
        same = stride == 1 and features == width
        down = nn.Sequential(nn.Conv2d(features, width, 1, stride, bias=False), nn.BatchNorm2d(width))
        self.beside = nn.Identity() if same else down

    def forward(self, x):
        return self.neuron2(self.norm2(self.conv2(self.neuron1(self.norm1(self.conv1(x))))) + self.beside(x))


def resnet18(neuron, classes=10):
    blocks, features = [], 64
    for width in (64, 128, 256, 512):
        for i in range(2):
            blocks.append(Block(features, width, 2 if width > 64 and not i else 1, neuron))
            features = width
    stem = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), neuron(), nn.MaxPool2d(3, 2, 1)
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes))


def training(adapter, way, dtype, T, B, size, device, wrap=lambda net: net):
    """(step, xs, labels). "bfloat16" is autocast, "tf32" float32 outside the products; `way` "relu" has no neurons."""
    kind = "bfloat16" if dtype == "bfloat16" else "float32"
    neuron = nn.ReLU if way == "relu" else lambda: OverTime(T, Function(adapter.lif(way, kind)))
    torch.manual_seed(0)
    net = wrap(resnet18(neuron).to(device).to(memory_format=torch.channels_last))
    xs = (torch.rand(T * B, 3, size, size, device=device) < 0.5).float().contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (B,), device=device)
    adam = torch.optim.Adam(net.parameters(), 1e-3, fused=True, capturable=device.type == "cuda")

    def step(xs, labels):
        adam.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            logits = net(xs).view(T, B, -1).mean(0)
        loss = F.cross_entropy(logits.float(), labels)
        loss.backward()
        adam.step()
        return loss.detach()

    return step, xs, labels


class Function(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x):
        return self.f(x)
