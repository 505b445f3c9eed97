"""A small class-conditional U-Net for 8x8 images, in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

CLASSES = 10
NO_CLASS = CLASSES  # the label that asks for no digit in particular: the unconditional half of guidance


def time_features(t: Tensor, dim: int) -> Tensor:
    """Sines and cosines of t in [0, 1] at dim / 2 frequencies from 1 to 1000: (B,) -> (B, dim)."""
    frequencies = torch.exp(torch.linspace(0.0, math.log(1000.0), dim // 2, device=t.device))
    angles = t[:, None] * frequencies
    return torch.cat((angles.sin(), angles.cos()), dim=1)


class ResidualBlock(nn.Module):
    """Two convolutions with group norms; time and class scale and shift the second norm (as in ADM and DiT)."""

    def __init__(self, inputs: int, outputs: int, embedding: int) -> None:
        super().__init__()
        self.norm_1 = nn.GroupNorm(8, inputs)
        self.conv_1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.modulation = nn.Linear(embedding, 2 * outputs)
        self.norm_2 = nn.GroupNorm(8, outputs)
        self.conv_2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        nn.init.zeros_(self.conv_2.weight)  # each block starts as the identity

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.modulation(embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.conv_1(nn.functional.silu(self.norm_1(x)))
        h = self.conv_2(nn.functional.silu(torch.addcmul(shift, self.norm_2(h), 1 + scale)))
        return self.skip(x) + h


class UNet(nn.Module):
    """Velocity of 8x8 images with one channel, given time and class; three resolutions: 8, 4 and 2.

    Args:
        channels: features at full resolution; twice as many below. A multiple of 8.
    """

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        c, e = channels, 4 * channels
        self.classes = nn.Embedding(CLASSES + 1, e)
        self.time = nn.Sequential(nn.Linear(e, e), nn.SiLU(), nn.Linear(e, e))
        self.stem = nn.Conv2d(1, c, 3, padding=1)
        self.down_8 = ResidualBlock(c, c, e)
        self.to_4 = nn.Conv2d(c, 2 * c, 2, stride=2)
        self.down_4 = ResidualBlock(2 * c, 2 * c, e)
        self.to_2 = nn.Conv2d(2 * c, 2 * c, 2, stride=2)
        self.middle = ResidualBlock(2 * c, 2 * c, e)
        self.from_2 = nn.ConvTranspose2d(2 * c, 2 * c, 2, stride=2)
        self.up_4 = ResidualBlock(4 * c, 2 * c, e)
        self.from_4 = nn.ConvTranspose2d(2 * c, c, 2, stride=2)
        self.up_8 = ResidualBlock(2 * c, c, e)
        self.norm = nn.GroupNorm(8, c)
        self.head = nn.Conv2d(c, 1, 3, padding=1)
        nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """x (B, 1, 8, 8), t (B,) in [0, 1], labels (B,) in 0 .. 9 or NO_CLASS; the velocity, of x's shape."""
        features = time_features(t, self.classes.embedding_dim)
        embedding = nn.functional.silu(self.time(features) + self.classes(labels))
        x_8 = self.down_8(self.stem(x), embedding)
        x_4 = self.down_4(self.to_4(x_8), embedding)
        h = self.middle(self.to_2(x_4), embedding)
        h = self.up_4(torch.cat((self.from_2(h), x_4), dim=1), embedding)
        h = self.up_8(torch.cat((self.from_4(h), x_8), dim=1), embedding)
        return self.head(nn.functional.silu(self.norm(h)))
