"""The two networks: the assignment's ResNet for 32 x 32 images, and torchvision's ResNet-18."""

import torch
import torchvision
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Figure 2: two 3x3 convolutions and a short cut, with no ReLU after the addition.

    Where the shape changes the short cut is option B of He et al. 2015 (arXiv:1512.03385, 3.3).
    Maps (N, in_channels, H, W) to (N, channels, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(self, in_channels: int, channels: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Identity()
        if stride != 1 or in_channels != channels:
            projection = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(self.conv1(x)))
        return self.bn2(self.conv2(out)) + self.shortcut(x)


def stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    """Return the blocks of one stage; the stride is that of the first block."""
    first = BasicBlock(in_channels, channels, stride)
    return nn.Sequential(first, *(BasicBlock(channels, channels) for _ in range(blocks - 1)))


class ResNet(nn.Module):
    """Figure 1: the network of part 1, 3,559,556 parameters, 214.8 M multiply-adds at 32 x 32.

    `dropout` is the probability of the dropout after conv1's ReLU, per element as in the figure.
    Weights are drawn by He et al. 2015 (arXiv:1502.01852), equation 14: normal with variance
    2 / (k^2 * out_channels); the head keeps PyTorch's default for linear layers.
    Maps float images (N, 3, H, W), H and W at least 1, to logits (N, num_classes).
    """

    def __init__(self, num_classes: int = 100, dropout: float = 0.0):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.dropout = nn.Dropout(dropout)
        self.conv2_x = stage(32, 32, blocks=2, stride=1)
        self.conv3_x = stage(32, 64, blocks=4, stride=2)
        self.conv4_x = stage(64, 128, blocks=4, stride=2)
        self.conv5_x = stage(128, 256, blocks=2, stride=2)
        self.fc = nn.Linear(256, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        x = self.dropout(torch.relu(self.bn1(self.conv1(images))))  # (N, 32, 32, 32)
        x = self.conv2_x(x)
        x = self.conv3_x(x)  # (N, 64, 16, 16)
        x = self.conv4_x(x)  # (N, 128, 8, 8)
        x = self.conv5_x(x)  # (N, 256, 4, 4)
        # Max pooling over the whole map; amax, unlike adaptive pooling, is deterministic on CUDA.
        return self.fc(x.amax(dim=(2, 3)))  # (N, num_classes)


def resnet18(num_classes: int = 100) -> nn.Module:
    """Part 2: torchvision's ResNet-18 (He et al. 2015, table 1) with random weights and a new `fc`.

    Maps float images (N, 3, H, W), H and W at least 32, usually 224, to logits (N, num_classes).
    """
    model = torchvision.models.resnet18()
    model.fc = nn.Linear(model.fc.in_features, num_classes)
    return model
