"""The two networks: the assignment's ResNet for 32 x 32 images, and torchvision's ResNet-18.

Nothing here touches a device or reads a flag: `ResNet()` and `resnet18()` return plain float32
modules on the CPU, whose `state_dict()` is what the training scripts write to `model.pt`. Below
them, how such files are written whole and read safely.
"""

import contextlib
import errno
import hashlib
import http.client
import io
import logging
import os
import pickle
import pickletools
import re
import warnings
import zipfile
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

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
    lies beside this module or in torch's cache, else torchvision's own hash-checked download. The
    head has PyTorch's default initialisation. Maps float images (N, 3, 224, 224) to logits
    (N, num_classes).

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
    places = Path(__file__).parent, Path(torch.hub.get_dir(), "checkpoints")
    known = [place / name for place in places for name in RESNET18_FILES]
    path = Path(weights) if weights else next(filter(Path.is_file, known), None)
    if path:
        _note_other_content(path)
        return str(path), None
    reason = "--no-download forbids to fetch them"
    if download:
        try:
            return official.url, official.get_state_dict(check_hash=True, weights_only=True)
        except (OSError, RuntimeError, http.client.HTTPException) as error:  # or a wrong hash
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
    try:
        content = path.read_bytes()
    except OSError:
        return  # reading it in earnest says why
    if not hashlib.sha256(content).hexdigest().startswith(digest):
        log.info(f"note       {path}: not the official SHA-256; only its form is checked")


def load_weights(model: nn.Module, path: Path | str, state: dict | None = None) -> None:
    """Load the state_dict in `path`, or `state` from there, strictly.

    Raises UserError if it cannot be read or is another network's.
    """
    try:
        model.load_state_dict(load_tensors(path) if state is None else state)
    except DamagedFile as error:
        raise UserError(f"{error}; get or make it again") from error
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: weights of another network ({reason} ...)") from error


USER_ERROR = 2  # the exit status
MOST_OPCODES = 1_000_000  # in a pickle; the official train has 0.4 million
MOST_TUPLES = 10_000  # in a pickle; a checkpoint of part 2 has 1,400
TENSOR_GLOBALS = re.compile(  # what a pickled dict of tensors calls
    r"collections OrderedDict|torch\._utils _rebuild_(tensor|tensor_v2|parameter)|torch \w+Storage"
)


class UserError(Exception):
    """Reported in one line on stderr, without a traceback; `status` is the exit status."""

    def __init__(self, message: str, status: int = USER_ERROR):
        super().__init__(message)
        self.status = status


class DamagedFile(UserError):
    """A file whose content is not whole, or not what its place asks for."""


def write_atomically(path: Path, content: bytes, previous: Path | None = None) -> None:
    """Write `path` whole or not at all, also across a power cut; raises OSError.

    What `path` held becomes `previous`, if that is given, once the new content is on the disk.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if previous and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the renames are on disk once the directory is
        directory = os.open(path.parent, os.O_RDONLY)
        with contextlib.suppress(OSError):  # which some network file systems cannot do
            os.fsync(directory)
        os.close(directory)


def save_tensors(path: Path, content: dict, previous: Path | None = None) -> None:
    """Write a dict of tensors, numbers, strings and dicts for `load_tensors`; raises OSError."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, buffer.getbuffer(), previous)


def load_tensors(path: Path | str) -> dict:
    """Read a .pt or .pth file onto the CPU without executing anything that it holds.

    Raises UserError if it is missing or unreadable, and DamagedFile if a checksum is wrong or it
    holds anything but tensors and plain containers.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115, for an error here is another than one in reading
    except OSError as error:
        raise UserError(f"{path}: {error.strerror.lower()}") from error
    try:
        with file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            is_zip = file.read(4) == b"PK\x03\x04"
            file.seek(0)
            if is_zip:
                _check_zip(file)
            else:  # the format before PyTorch 1.6: five pickles, then the numbers
                for _ in range(5):
                    check_pickle(file, TENSOR_GLOBALS)
            file.seek(0)
            content = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(content, dict):
            raise Refused(f"holds a {type(content).__name__}, not a dict of tensors")
        return content
    except Refused as error:
        raise DamagedFile(f"{path}: {error}") from error
    except Exception as error:  # a damaged file can raise anything
        if isinstance(error, OSError) and error.errno not in (None, errno.EIO):  # of the place
            raise UserError(f"{path}: cannot be read ({error})") from error
        reason = f"not a PyTorch file, or a damaged one ({type(error).__name__})"
        raise DamagedFile(f"{path}: {reason}") from error


def _check_zip(file) -> None:
    """Verify the checksums, which torch.load does not, before it inflates or believes anything."""
    with zipfile.ZipFile(file) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise zipfile.BadZipFile("compressed, which torch.save never does")
        if damaged := archive.testzip():
            raise zipfile.BadZipFile(f"{damaged} has a wrong checksum")
        for name in archive.namelist():
            if name.endswith(".pkl"):
                check_pickle(io.BytesIO(archive.read(name)), TENSOR_GLOBALS)


class Refused(pickle.UnpicklingError):
    """A pickle asks for what no file of ours needs."""


def check_pickle(file, allowed: re.Pattern) -> None:
    """Read through one pickle, before anything is built from it, up to its end.

    Unpicklers believe what they read: each byte can cost them an empty list, a memo index of 2^31
    costs 32 GB, and the hash of tuples nested a million deep overflows the stack. `allowed` matches
    "module name" of what may be called. Raises Refused, or ValueError if it is no pickle.
    """
    tuples = 0
    for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        tuples += "TUPLE" in opcode.name
        if opcode.name == "GLOBAL" and not allowed.fullmatch(argument):
            raise Refused(f"refused, for it asks for {argument.replace(' ', '.')}")
        index = int(argument) if "PUT" in opcode.name else 0
        if tuples > MOST_TUPLES or max(count, index) > MOST_OPCODES:
            raise Refused("refused, for it counts or nests further than any file of ours")
