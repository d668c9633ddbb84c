"""A made-up set in the shape of CIFAR-100, for tries without data."""

import torch
from torch import Tensor

from cifar100.classes import CLASSES

NAMES = tuple(f"hue {label % 10} plaid {label // 10}" for label in range(CLASSES))


def draw(per_class: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return images uint8 (N, 3, 32, 32) and labels int64 (N,) of 10 hues times 10 plaids."""
    angles = torch.arange(10) * (2 * torch.pi / 10)
    hues = 0.5 + 0.3 * torch.stack([torch.cos(angles - k * 2 * torch.pi / 3) for k in range(3)], 1)
    # Cycles over the image; fine enough to be told apart by the first layers' small fields of view.
    waves = 3 * torch.tensor([(x, y) for x in range(3) for y in range(4) if 0 < x + y < 5])
    pixels = torch.arange(32) * (2 * torch.pi / 32)
    labels = torch.arange(CLASSES).repeat(per_class)
    count = len(labels)
    phases = torch.rand(2, count, 1, generator=generator) * 2 * torch.pi
    x, y = (waves[labels // 10][:, axis, None] * pixels + phases[axis] for axis in (0, 1))
    plaid = torch.cos(y)[:, None, :, None] * torch.cos(x)[:, None, None]  # (count, 1, 32, 32)
    noise = 0.1 * torch.randn(count, 3, 32, 32, generator=generator)
    images = hues[labels % 10][:, :, None, None] + 0.3 * plaid + noise
    return (images.clamp(0, 1) * 255).byte(), labels
