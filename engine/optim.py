"""Muon, the groups of weights that it or SGD trains, and the schedules of a run."""

import contextlib
import copy
import inspect
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from utils import guard, log

WARMUP = 0.2  # of the steps, in which the rate rises, Smith & Topin 2017, arXiv:1708.07120
# CutMix is off in the last 30 % of the epochs, at most 6: in runs of 40 epochs, 6 did better than
# 12 (results/README.md). YOLOX also stops mixing images early (Ge et al. 2021, arXiv:2107.08430).
UNMIXED, MOST_UNMIXED = 0.3, 6
MUON_KINDS = ("convolutions", "1x1 convolutions")  # kinds of weights that Muon takes, see `kinds`


class Muon(torch.optim.SGD):
    """Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/), and SGD.

    In a group with the key "muon" (the momentum), the gradient of each convolution (out, in, k, k)
    becomes a nearly orthogonal matrix (out, in k k), with no factor for its shape. All other groups
    are plain SGD. Unlike torch.optim.Muon it takes many matrices at once: all of one shape, or with
    `pad` all of as many rows, the narrower ones padded with zeros, which is faster only on a GPU.
    """

    def __init__(self, groups: list[dict], dtype: torch.dtype, pad: bool = False,
                 iterations: int = 5):
        # Drop groups without weights, as when all of a kind are frozen. If all are empty, keep
        # them, so that check_groups can say so.
        super().__init__([group for group in groups if group["params"]] or groups)
        if any("muon" in group and not group["params"] for group in groups):
            log.info("note       Muon has no weight to train, so --lr has no effect; --optimizer "
                     "sgd uses it")
        self.dtype, self.pad, self.iterations = dtype, pad, iterations
        self.zeros: dict[torch.Size, Tensor] = {}  # by shape, (widest, out)
        self.rates: list[Tensor] = []  # of the groups, if CUDA graphs repeat the steps

    @torch.no_grad()
    def step(self) -> None:
        """Put orthogonal matrices in place of the convolutions' gradients; take SGD's step."""
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None and p.numel()]
            if weights and "muon" in group:
                # SGD's own momentum is 0 in such a group: it adds the weight decay and steps.
                self._orthogonalize_gradients(weights, group["muon"])
        with self._rates_on_device():
            # Without the wrapper of a public step(), which would call the user's hooks once more.
            inspect.unwrap(torch.optim.SGD.step)(self)

    def put_rates_on(self, device: torch.device) -> None:
        """Keep the groups' rates on the device, too: a graph would repeat a number of the host."""
        self.rates = [torch.zeros((), device=device) for _ in self.param_groups]

    def set_rates(self) -> None:
        """Copy the rates of the groups, also of new ones, to the device."""
        self.rates += [torch.zeros_like(self.rates[0])
                       for _ in self.param_groups[len(self.rates) :]]
        for rate, group in zip(self.rates, self.param_groups, strict=True):
            rate.fill_(group["lr"])  # the number is an argument of the kernel: nothing waits

    @contextlib.contextmanager
    def _rates_on_device(self) -> Iterator[None]:
        """Have SGD read its rates on the device, if they are there; only its fused form can."""
        if self.rates and not torch.cuda.is_current_stream_capturing():
            self.set_rates()  # again, for the step itself may have changed them
        before = [(group["lr"], group["fused"]) for group in self.param_groups]
        for group, rate in zip(self.param_groups, self.rates, strict=False):
            group["lr"], group["fused"] = rate, True
            for weight in group["params"] if group["momentum"] else ():
                # The fused form wants the momentum of all weights or of none.
                if weight.grad is not None and "momentum_buffer" not in self.state[weight]:
                    self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
        try:
            yield
        finally:  # floats again, for the schedule, the log and the checkpoints
            for group, values in zip(self.param_groups, before, strict=True):
                group["lr"], group["fused"] = values

    def _orthogonalize_gradients(self, weights: list[Tensor], momentum: float) -> None:
        stacks = {}  # of weights whose gradients are orthogonalised together
        for weight in weights:
            stacks.setdefault(len(weight) if self.pad else weight.shape, []).append(weight)
            if "momentum_buffer" not in self.state[weight]:
                self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
        averages = [self.state[weight]["momentum_buffer"] for weight in weights]
        grads = [weight.grad for weight in weights]
        torch._foreach_lerp_(averages, grads, 1 - momentum)
        torch._foreach_lerp_(grads, averages, momentum)  # Nesterov's form
        orthogonal = self._padded if self.pad else self._of_one_shape
        for stack in stacks.values():
            for weight, grad in zip(stack, orthogonal([w.grad for w in stack]), strict=True):
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
        widest = max(narrow, key=len).shape
        if widest not in self.zeros:
            self.zeros[widest] = narrow[0].new_zeros(widest)
        zeros = self.zeros[widest]
        pieces = [piece for matrix in narrow for piece in (matrix, zeros[len(matrix) :])]
        matrices = torch.cat(pieces).view(len(grads), *zeros.shape).mT  # (N, out, widest)
        matrices = orthogonalize(matrices, self.dtype, self.iterations).to(zeros.dtype)
        return [matrix[:, : grad[0].numel()].view(grad.permute(0, 2, 3, 1).shape)
                .permute(0, 3, 1, 2) for matrix, grad in zip(matrices, grads, strict=True)]


def orthogonalize(matrices: Tensor, dtype: torch.dtype, iterations: int = 5) -> Tensor:
    """Bring the singular values of (N, rows, columns) near 1, and keep the singular vectors.

    Five Newton-Schulz iterations turn U S V' into about U V'. With fewer, small singular values end
    further below 1. Columns of zeros stay zeros. The coefficients are Jordan's.
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


def kinds(model: nn.Module) -> dict[nn.Parameter, str]:
    """Return the kind of each weight, as the log calls it."""
    kind_of = {}
    for module in model.modules():
        for weight in module.parameters(recurse=False):
            kind = "other matrices" if weight.ndim > 1 else "norms and biases"
            if isinstance(module, nn.Linear) and weight is module.weight:
                kind = "linear layers"
            elif isinstance(module, nn.Conv2d) and weight is module.weight:
                kind = "1x1 convolutions" if weight.shape[2:].numel() == 1 else "convolutions"
                # A depthwise or grouped convolution is many small matrices rather than one.
                kind = "grouped convolutions" if module.groups > 1 else kind
            kind_of.setdefault(weight, kind)
    return kind_of


def split(model: nn.Module, head: str = "") -> tuple[list[nn.Parameter], ...]:
    """Return the weights that are trained: those that Muon takes, matrices, vectors, and the head.

    Muon takes MUON_KINDS. Matrices are all others of two or more dimensions: linear layers, grouped
    convolutions, tokens. No weight of the layer `head` is in the other three.
    """
    kind_of = kinds(model)
    for_muon, matrices, vectors, of_head = [], [], [], []
    for name, weight in model.named_parameters():
        if not weight.requires_grad:
            continue
        if head and name.startswith(f"{head}."):
            of_head.append(weight)
        elif kind_of[weight] in MUON_KINDS:
            for_muon.append(weight)
        else:
            (matrices if weight.ndim > 1 else vectors).append(weight)
    if head and not of_head:
        log.info(f"note       no layer {head!r} is trained (HEAD in the script): no weight has the "
                 "rate of the head")
    return for_muon, matrices, vectors, of_head


def frozen_modules(model: nn.Module) -> set[nn.Module]:
    """Return the modules whose weights are all frozen, and all that is inside of them."""
    frozen = set()
    for module in model.modules():
        are_trained = [weight.requires_grad for weight in module.parameters()]
        if are_trained and not any(are_trained):
            frozen.update(module.modules())  # those without weights, such as dropout, too
    return frozen


def rates(scheduler: LRScheduler, total_steps: int) -> list[list[float]]:
    """Return each step's rates, one a group, as a copy finds them that shares the weights."""
    weights = [weight for group in scheduler.optimizer.param_groups for weight in group["params"]]
    by_step = []
    with (guard("the schedule must be one whose step() takes no argument, and that can be copied",
                Exception), warnings.catch_warnings()):
        twin = copy.deepcopy(scheduler, {id(weight): weight for weight in weights})
        warnings.simplefilter("ignore")  # torch warns that the copy's optimizer takes no steps
        for _ in range(total_steps):
            by_step.append([float(group["lr"]) for group in twin.optimizer.param_groups])
            twin.step()
    return by_step


class Sizes:
    """The sides in pixels of each epoch's images: `low` in the first `fraction` of the epochs.

    An epoch is tested at its own size, for batch norm has averages of that, but the last at `full`.
    """

    def __init__(self, epochs: int, fraction: float, low: int, full: int):
        low_epochs = int(fraction * epochs + 1e-9)  # 0.58 x 50 is 28.999... in floating point
        self.train = [low] * low_epochs + [full] * (epochs - low_epochs)
        self.test = [*self.train[:-1], full]
        self.all = {low, full} if fraction else {full}  # also if this run is too short for `low`


def cutmix_by_epoch(epochs: int, probability: float) -> list[float]:
    """Return each epoch's probability of CutMix, which is 0 in the last epochs."""
    unmixed = min(int(UNMIXED * epochs), MOST_UNMIXED)
    return [probability] * (epochs - unmixed) + [0.0] * unmixed


def one_cycle(optimizer: torch.optim.Optimizer, total_steps: int) -> OneCycleLR:
    """Return Smith & Topin's schedule: rates rise linearly to each group's `lr`, then fall to 0."""
    peaks = [group["lr"] for group in optimizer.param_groups]
    # One step more keeps the last rate above 0. Below 6 steps OneCycleLR divides by zero.
    return OneCycleLR(optimizer, peaks, max(total_steps, 5) + 1, pct_start=WARMUP,
                      anneal_strategy="linear", cycle_momentum=False)
