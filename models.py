"""The two networks: the assignment's ResNet for 32 x 32 images, and torchvision's ResNet-18.

Nothing here touches a device or reads a flag: `ResNet()` and `resnet18()` return plain float32
modules on the CPU, whose `state_dict()` is what the training scripts write to `model.pt`.
"""

import hashlib
import logging
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from utils import DamagedFile, UserError, load_tensors

log = logging.getLogger("cifar100")

# Figure 1 of the assignment, conv2_x to conv5_x: channels, blocks, stride.
STAGES = ((32, 2, 1), (64, 4, 2), (128, 4, 2), (256, 2, 2))

# The ImageNet file of the course (2018) and the one that torchvision downloads today.
RESNET18_FILES = ("resnet18-5c106cde.pth", "resnet18-f37072fd.pth")


class BasicBlock(nn.Module):
    """Figure 2: two 3x3 convolutions and a short cut, with no ReLU after the addition.

    The stride is that of the first convolution; where the shape changes the short cut is option B
    of He et al. 2015 (arXiv:1512.03385, section 3.3), a 1x1 convolution and batch norm.
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
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(self.conv1(x)))
        return self.bn2(self.conv2(out)) + self.shortcut(x)


class ResNet(nn.Module):
    """Figure 1: the network of part 1, 3,559,556 parameters, 214.8 M multiply-adds at 32 x 32.

    `dropout` is the probability of the dropout after conv1's ReLU, per element as in the figure.
    Weights are drawn by He et al. 2015 (arXiv:1502.01852), equation 14: normal with variance
    2 / (k^2 * out_channels); the head keeps PyTorch's default for linear layers.
    Maps float images (N, 3, H, W), H and W at least 1, to logits (N, num_classes).
    """

    def __init__(self, num_classes: int = 100, dropout: float = 0.1):
        super().__init__()
        width = STAGES[0][0]
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.dropout = nn.Dropout(dropout)
        stages = []
        for channels, blocks, stride in STAGES:
            strides = [stride] + [1] * (blocks - 1)
            widths = [width] + [channels] * (blocks - 1)
            stages.append(nn.Sequential(*map(BasicBlock, widths, [channels] * blocks, strides)))
            width = channels
        self.conv2_x, self.conv3_x, self.conv4_x, self.conv5_x = stages
        self.fc = nn.Linear(width, num_classes)
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
        return self.fc(x.amax(dim=(2, 3)))


def resnet18(weights: str | None, num_classes: int = 100, download: bool = True) -> nn.Module:
    """Part 2: torchvision's ResNet-18 with ImageNet weights and a new head.

    `weights` is a file, or "random" for none at all; by default the first of RESNET18_FILES that
    lies beside this module, else torchvision's own hash-checked download. The head has PyTorch's
    default initialisation. Maps float images (N, 3, 224, 224) to logits (N, num_classes).

    Raises UserError if the file is missing, damaged, unsafe or another network's.
    """
    model = torchvision.models.resnet18()
    if weights != "random":
        source, state = _imagenet_weights(weights, download)
        load_weights(model, source, state)
        log.info(f"weights    {source}")
    model.fc = nn.Linear(model.fc.in_features, num_classes)
    return model


def _imagenet_weights(weights: str | None, download: bool) -> tuple[str, dict | None]:
    official = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    known = [Path(__file__).with_name(name) for name in RESNET18_FILES]
    known.append(Path(torch.hub.get_dir(), "checkpoints", Path(official.url).name))
    path = Path(weights) if weights else next(filter(Path.is_file, known), None)
    if path:
        _note_other_content(path)
        return str(path), None
    reason = "--no-download forbids to fetch them"
    if download:
        try:
            return official.url, official.get_state_dict(check_hash=True, weights_only=True)
        except (OSError, RuntimeError) as error:  # no network, no space, a wrong hash
            reason = f"downloading {official.url} failed: {error}"
    raise UserError(
        f"no ImageNet weights ({reason}); put {RESNET18_FILES[1]} beside {Path(__file__).name}, or "
        "name a file with --weights, or make a dry run with --weights random"
    )


def _note_other_content(path: Path) -> None:
    """Say so if a file of a known name is not the known file; its format has no checksum."""
    if path.name not in RESNET18_FILES or not path.is_file():
        return
    digest = path.stem.rpartition("-")[2]  # the first 8 hexadecimal digits of its SHA-256
    if not hashlib.sha256(path.read_bytes()).hexdigest().startswith(digest):
        log.info(f"note       {path}: not the official SHA-256; only its form is checked")


def load_weights(model: nn.Module, path: Path | str, state: dict | None = None) -> None:
    """Load the state_dict in `path`, or `state` from there, strictly.

    Raises UserError if it cannot be read or is another network's.
    """
    try:
        model.load_state_dict(load_tensors(path) if state is None else state)
    except DamagedFile as error:
        raise UserError(f"{error}; get it again") from error
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: weights of another network ({reason} ...)") from error
