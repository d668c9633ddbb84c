"""The two networks, and Muon, the optimizer of their convolutions.

The networks are the assignment's ResNet for 32 x 32 images, and torchvision's ResNet-18. `ResNet()`
and `resnet18()` return plain float32 modules on the CPU, whose `state_dict()` is what the scripts
write to `model.pt`. Nothing here reads a flag.
"""

import hashlib
import http.client
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from utils import DamagedFile, UserError, guard, load_tensors, log

# The ImageNet file of the course (2018) and the one that torchvision downloads today.
RESNET18_FILES = ("resnet18-5c106cde.pth", "resnet18-f37072fd.pth")


class BasicBlock(nn.Module):
    """Figure 2: two 3x3 convolutions and a short cut, with no ReLU after the addition.

    The stride is that of the first convolution. Where the shape changes the short cut is option B
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
            projection = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
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
        """Return the logits of the images."""
        x = self.dropout(torch.relu(self.bn1(self.conv1(images))))  # (N, 32, 32, 32)
        x = self.conv2_x(x)
        x = self.conv3_x(x)  # (N, 64, 16, 16)
        x = self.conv4_x(x)  # (N, 128, 8, 8)
        x = self.conv5_x(x)  # (N, 256, 4, 4)
        # Max pooling over the whole map; amax, unlike adaptive pooling, is deterministic on CUDA.
        x = x.amax(dim=(2, 3))  # (N, 256)
        return self.fc(x)


def resnet18(weights: str | None, num_classes: int = 100, download: bool = True) -> nn.Module:
    """Part 2: torchvision's ResNet-18 with ImageNet weights and a new head.

    `weights` is a file, or "random" for none at all. By default it is the first of RESNET18_FILES
    that lies beside this module or in torch's cache, else torchvision's own hash-checked download.
    The head has PyTorch's default initialisation. Maps float images (N, 3, 224, 224) to logits
    (N, num_classes). Raises UserError if the file is missing, damaged, unsafe or another network's.
    """
    model = torchvision.models.resnet18()
    if weights != "random":
        places = (Path(__file__).parent, Path(torch.hub.get_dir(), "checkpoints"))
        known = (place / name for place in places for name in RESNET18_FILES)
        path = Path(weights) if weights else next(filter(Path.is_file, known), None)
        path = path or _download(download)
        load_weights(model, path)
        if path.name in RESNET18_FILES:
            # The name holds 8 digits of the SHA-256; the format has no checksum of its own.
            digest = path.stem.rpartition("-")[2]
            if not hashlib.sha256(path.read_bytes()).hexdigest().startswith(digest):
                log.info(f"note       {path}: not the official SHA-256; only its form is checked")
        log.info(f"weights    {path}")
    model.fc = nn.Linear(model.fc.in_features, num_classes)
    return model


def _download(allowed: bool) -> Path:
    """Download torchvision's own file into torch's cache; return its path. Raises UserError."""
    official = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    reason = "--no-download forbids to fetch them"
    if allowed:
        try:
            official.get_state_dict(check_hash=True, weights_only=True)
            return Path(torch.hub.get_dir(), "checkpoints", RESNET18_FILES[1])
        # RuntimeError: the file has another hash.
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            reason = f"downloading {official.url} failed: {error}"
    raise UserError(f"no ImageNet weights ({reason}); put {RESNET18_FILES[1]} beside "
                    f"{Path(__file__).name}, or name a file with --weights, or make a dry run with "
                    "--weights random")


def describe(model: nn.Module) -> dict:
    """Return the network's name, its number of parameters, and the rows of its layers' table."""
    layers = []
    for name, layer in model.named_children():
        kind = type(layer).__name__
        parts = {type(part).__name__ for part in layer.children()}
        if isinstance(layer, nn.Sequential) and len(parts) == 1:
            kind = f"{len(layer)} x {parts.pop()}"
        layers.append([name, kind, sum(p.numel() for p in layer.parameters())])
    total = sum(p.numel() for p in model.parameters())
    return {"name": type(model).__name__, "parameters": total, "layers": layers}


def difference(state: dict, model: nn.Module) -> str:
    """Return in words where a state_dict differs from the network's in names or shapes, or ""."""
    now = model.state_dict()
    for name in {**state, **now}:
        if name.endswith("num_batches_tracked"):
            continue  # PyTorch before 0.4.1 did not count batches
        was, has = (f"{name} {tuple(each[name].shape)}" if name in each else f"no {name}"
                    for each in (state, now))
        if was != has:
            return f"it has {was}, where this one has {has}"
    return ""


def load_weights(model: nn.Module, path: Path | str) -> None:
    """Load a file's state_dict strictly; raises UserError if it is damaged or misfits."""
    try:
        state = load_tensors(path)
    except DamagedFile as error:
        raise UserError(f"{error}; get or make it again") from error
    with guard(f"{path}: weights of another network", Exception):
        if words := difference(state, model):
            raise UserError(f"{path}: weights of another network: {words}")
        model.load_state_dict(state)


class Muon(torch.optim.SGD):
    """Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/), and SGD.

    In a group with the key "muon" (the momentum), the gradient of each convolution (out, in, k, k)
    becomes a nearly orthogonal matrix (out, in k k), with no factor for its shape. All other groups
    are plain SGD. `dtype` and `iterations` are those of `orthogonalize`, which unlike
    torch.optim.Muon's takes many matrices at once: all of one shape, or with `pad` all of as many
    rows, the narrower ones padded with zeros (more arithmetic in fewer kernels, faster only on a
    GPU).
    """

    def __init__(self, groups: list[dict], dtype: torch.dtype, pad: bool = False,
                 iterations: int = 5):
        super().__init__(groups)
        self.dtype, self.pad, self.iterations = dtype, pad, iterations
        self.zeros: dict[tuple[int, int], Tensor] = {}  # (widest, out)

    @torch.no_grad()
    def step(self) -> None:
        """Put orthogonal matrices in place of the convolutions' gradients; take SGD's step.

        SGD's own momentum is 0 in these groups: it adds the weight decay and steps.
        """
        for group in self.param_groups:
            if "muon" in group:
                weights = [weight for weight in group["params"]
                           if weight.grad is not None and weight.numel()]
                if weights:
                    self._orthogonalize_gradients(weights, group["muon"])
        super().step()

    def _orthogonalize_gradients(self, weights: list[Tensor], momentum: float) -> None:
        # Lists of weights whose gradients are orthogonalised together.
        alike = {}
        for weight in weights:
            if "momentum_buffer" not in self.state[weight]:
                self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
            alike.setdefault(len(weight) if self.pad else weight.shape, []).append(weight)
        averages = [self.state[weight]["momentum_buffer"] for weight in weights]
        grads = [weight.grad for weight in weights]
        torch._foreach_lerp_(averages, grads, 1 - momentum)
        torch._foreach_lerp_(grads, averages, momentum)  # Nesterov's form
        orthogonal = self._padded if self.pad else self._of_one_shape
        for some in alike.values():
            for weight, grad in zip(some, orthogonal([w.grad for w in some]), strict=True):
                grad = grad.to(weight.dtype, memory_format=torch.channels_last)
                # SGD wants dense gradients. This copies the slices of padded matrices alone.
                weight.grad = grad.contiguous(memory_format=torch.channels_last)

    def _of_one_shape(self, grads: list[Tensor]) -> Tensor:
        stacked = torch.stack(grads)  # (N, out, in, k, k)
        matrices = orthogonalize(stacked.flatten(2), self.dtype, self.iterations)
        return matrices.view(stacked.shape)

    def _padded(self, grads: list[Tensor]) -> list[Tensor]:
        # The columns are in the order of k, k, in, which is that of channels-last memory.
        narrow = [grad.permute(2, 3, 1, 0).flatten(0, 2) for grad in grads]  # (k k in, out) each
        rows, widest = len(grads[0]), max(map(len, narrow))
        if (widest, rows) not in self.zeros:
            self.zeros[widest, rows] = narrow[0].new_zeros(widest, rows)
        zeros = self.zeros[widest, rows]
        pieces = [piece for one in narrow for piece in (one, zeros[: widest - len(one)])]
        matrices = torch.cat(pieces).view(-1, widest, rows).mT  # (N, out, widest)
        matrices = orthogonalize(matrices, self.dtype, self.iterations).to(grads[0].dtype)
        return [matrix[:, : len(one)].view(grad.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)
                for matrix, one, grad in zip(matrices, narrow, grads, strict=True)]


def orthogonalize(matrices: Tensor, dtype: torch.dtype, iterations: int = 5) -> Tensor:
    """Bring the singular values of (N, rows, columns) near 1, and keep the singular vectors.

    By five Newton-Schulz iterations U S V' becomes about U V'. With fewer, small singular values
    end further below 1. Columns of zeros stay zeros. The coefficients of x -> a x + b x^3 + c x^5
    are Jordan's.
    """
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonalize(matrices.mT, dtype, iterations).mT
    x = torch.empty_like(matrices, dtype=dtype)
    torch.div(matrices, matrices.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7), out=x)
    for _ in range(iterations):
        gram = x @ x.mT
        factor = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, factor, x, beta=3.4445)
    return x
