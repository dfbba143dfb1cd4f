"""The catalogue's own networks, and the one place that turns an architecture into a torch module.

Owns module definitions whose parameter names match the published weights. Never holds weights itself: `construct` builds on the meta device, so that
it costs neither memory nor random numbers; `models.weights` and `models.seeded` supply the tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from models import catalogue
from models.attention import Bert, Gpt2, Vit

_CONTEXT = 64


class Mlp(nn.Module):
    """Linear layers and ReLU."""

    def __init__(self, config: catalogue.Mlp) -> None:
        super().__init__()
        widths = [config.features, *[config.width] * config.depth]
        self.hidden = nn.ModuleList(nn.Linear(before, after) for before, after in pairwise(widths))
        self.head = nn.Linear(config.width, config.classes)

    def forward(self, features: Tensor) -> Tensor:
        """Features [batch, features] -> scores [batch, classes]."""
        for layer in self.hidden:
            features = functional.relu(layer(features))
        return cast(Tensor, self.head(features))


class Cnn(nn.Module):
    """Convolutions and ReLU, then the mean over the image."""

    def __init__(self, config: catalogue.Cnn) -> None:
        super().__init__()
        channels = [3, *(config.channels << step for step in range(config.depth))]
        pairs = pairwise(channels)
        self.layers = nn.ModuleList(
            nn.Conv2d(before, after, 3, stride=1 if step == 0 else 2, padding=1) for step, (before, after) in enumerate(pairs)
        )
        self.head = nn.Linear(channels[-1], config.classes)

    def forward(self, image: Tensor) -> Tensor:
        """Image [batch, 3, size, size] -> scores [batch, classes]."""
        for layer in self.layers:
            image = functional.relu(layer(image))
        return cast(Tensor, self.head(image.mean((2, 3))))


_BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
"""Bottlenecks in each of the four stages, by depth (He et al. 2016, table 1)."""


class _Bottleneck(nn.Module):
    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, width * 4, 1, bias=False), nn.BatchNorm2d(width * 4)
        self.downsample: nn.Module | None = None
        if stride != 1 or channels != width * 4:
            self.downsample = nn.Sequential(nn.Conv2d(channels, width * 4, 1, stride, bias=False), nn.BatchNorm2d(width * 4))

    def forward(self, x: Tensor) -> Tensor:
        inner = functional.relu(self.bn1(self.conv1(x)))
        inner = functional.relu(self.bn2(self.conv2(inner)))
        inner = self.bn3(self.conv3(inner))
        return functional.relu(inner + (x if self.downsample is None else self.downsample(x)))


def _stage(channels: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    rest = (_Bottleneck(width * 4, width, 1) for _ in range(blocks - 1))
    return nn.Sequential(_Bottleneck(channels, width, stride), *rest)


class ResNet(nn.Module):
    """Parameters are named as torchvision names them."""

    def __init__(self, config: catalogue.ResNet) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        first, second, third, fourth = _BLOCKS[config.depth]
        self.layer1 = _stage(64, 64, first, 1)
        self.layer2 = _stage(256, 128, second, 2)
        self.layer3 = _stage(512, 256, third, 2)
        self.layer4 = _stage(1024, 512, fourth, 2)
        self.fc = nn.Linear(2048, config.classes)

    def forward(self, image: Tensor) -> Tensor:
        """Image [batch, 3, size, size] -> scores [batch, classes]."""
        x = functional.max_pool2d(functional.relu(self.bn1(self.conv1(image))), 3, 2, 1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return cast(Tensor, self.fc(x.mean((2, 3))))


class Silero(nn.Module):
    """Silero VAD without state between calls.

    The published model is called chunk by chunk and keeps its state between calls; here the chunks of a recording go through the convolutions
    together and the state lives in the loop, so that a call depends on nothing before it. Each chunk follows the last 64 samples of the one before.
    """

    def __init__(self, config: catalogue.Silero) -> None:
        super().__init__()
        self.stft_conv = nn.Conv1d(1, 258, 256, stride=128, bias=False)
        self.conv1 = nn.Conv1d(129, 128, 3, padding=1)
        self.conv2 = nn.Conv1d(128, 64, 3, stride=2, padding=1)
        self.conv3 = nn.Conv1d(64, 64, 3, stride=2, padding=1)
        self.conv4 = nn.Conv1d(64, 128, 3, padding=1)
        self.lstm_cell = nn.LSTMCell(128, 128)
        self.final_conv = nn.Conv1d(128, 1, 1)

    def forward(self, audio: Tensor) -> Tensor:
        """Audio [batch, chunks, 512] at 16 kHz -> probability of speech [batch, chunks]."""
        batch, chunks, _ = audio.shape
        before = functional.pad(audio[:, :-1, -_CONTEXT:], (0, 0, 1, 0))
        windows = functional.pad(torch.cat((before, audio), -1).flatten(0, 1), (0, _CONTEXT), "reflect")
        real, imaginary = self.stft_conv(windows.unsqueeze(1)).chunk(2, 1)
        x = (real.square() + imaginary.square()).sqrt()
        for layer in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = functional.relu(layer(x))
        steps = x.view(batch, chunks, 128)
        hidden = cell = audio.new_zeros(batch, 128)
        states = []
        for step in range(chunks):
            hidden, cell = self.lstm_cell(steps[:, step], (hidden, cell))
            states.append(hidden)
        speech = torch.sigmoid(self.final_conv(functional.relu(torch.stack(states, -1))))
        return speech.squeeze(1)


_MODULES: Mapping[type, Callable[..., nn.Module]] = {
    catalogue.Mlp: Mlp,
    catalogue.Cnn: Cnn,
    catalogue.ResNet: ResNet,
    catalogue.Bert: Bert,
    catalogue.Vit: Vit,
    catalogue.Gpt2: Gpt2,
    catalogue.Silero: Silero,
}


def construct(config: catalogue.Config) -> nn.Module:
    """The network in evaluation mode, every parameter and buffer on the meta device."""
    with torch.device("meta"):
        return _MODULES[type(config)](config).eval()
