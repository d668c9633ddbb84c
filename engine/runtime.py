"""Where and how to compute: the device, the precision, and the processes of torchrun."""

import ctypes
import datetime
import logging
import os
import platform
import re
import sys
import warnings
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from utils import UserError, log, one_line

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# A rank with fewer images shares its batch norm with others, Wu & He 2018, arXiv:1803.08494.
FEW_IMAGES = 32
GRAPHED = ("cuda",)  # kinds of devices that can repeat a whole step: see engine/graphs.py
# These messages say that torch is too new for the GPU or its driver.
TOO_NEW = "driver.* too old|no kernel image"
OLDER = "; install a torch for CUDA 12 (README.md, 'Install'), or say --device cpu"


class Runtime(NamedTuple):
    """Where and how to compute, and this process's `rank` among the `ranks` of torchrun."""

    device: torch.device
    dtype: torch.dtype  # of the autocast operations; float32 switches autocast off
    compile: bool = False
    rank: int = 0
    ranks: int = 1
    graphs: bool = False  # training steps may be repeated as CUDA graphs

    @property
    def precision(self) -> str:
        """The name of `dtype` on the command line: fp32, bf16 or fp16."""
        return next(name for name, dtype in PRECISIONS.items() if dtype == self.dtype)

    def autocast(self) -> torch.autocast:
        """Return the context manager for the forward pass."""
        enabled = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype if enabled else None, enabled=enabled)

    def scaler(self) -> torch.amp.GradScaler:
        """Return a gradient scaler, which does nothing unless the precision is fp16."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def place(self, model: nn.Module, batch_size: int = 0) -> nn.Module:
        """Move `model` to the device, and compile it in place; its state_dict stays the same."""
        # SyncBatchNorm waits for the device three times a layer. The CPU does not have it.
        is_few = self.ranks > 1 and 0 < batch_size < FEW_IMAGES * self.ranks
        if self.device.type == "cuda" and is_few:
            nn.SyncBatchNorm.convert_sync_batchnorm(model)  # in place
        # Batch norms count their batches on the host, which takes no kernel. What is compiled or
        # repeated by a graph counts on the device.
        on_host = not (self.compile or self.graphs)
        counters = [(module, module.num_batches_tracked) for module in model.modules()
                    if hasattr(module, "num_batches_tracked") and on_host]
        model.to(self.device, memory_format=torch.channels_last)
        for module, counter in counters:
            module.num_batches_tracked = counter
        if self.compile:
            # Where CUDA's compiler is installed and no GPU, torch would warn of that.
            logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
            model.compile(dynamic=False)
        return model

    def reduce(self, values: torch.Tensor, operation: str = "SUM") -> torch.Tensor:
        """Return `values` reduced over the ranks, in float64 on the CPU; all ranks must call it."""
        values = values.cpu().double()
        if self.ranks > 1:
            dist.all_reduce(values, getattr(dist.ReduceOp, operation))
        return values

    def gather(self, value: Any) -> list:  # noqa: ANN401
        """Return the `value` of each rank; all ranks must call it."""
        values = [value] * self.ranks
        if self.ranks > 1:
            dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:  # noqa: ANN401
        """Return the `value` of rank 0, for which the others wait."""
        values = [value]
        if self.ranks > 1:
            dist.broadcast_object_list(values)
        return values[0]

    def __str__(self) -> str:
        name = str(self.device)
        if self.device.type == "cpu":
            name = f"CPU, {torch.get_num_threads()} threads"
        elif self.device.type == "cuda":
            name += f" ({torch.cuda.get_device_name(self.device)})"
        ranks = f"{self.ranks} x " if self.ranks > 1 else ""
        how = (", compiled" if self.compile else "") + (", by CUDA graphs" if self.graphs else "")
        return f"{ranks}{name}, {str(self.dtype).removeprefix('torch.')}{how}"


def choose_runtime(device: str, precision: str, compile_model: bool,
                   graphs: bool = False) -> Runtime:
    """Set up this process for these flags and return its Runtime; raises UserError."""
    device = find_device(device)
    dtype = fastest_dtype(device) if precision == "auto" else PRECISIONS[precision]
    if device.type == "cpu" and platform.libc_ver()[0] == "glibc":
        # Have freed blocks reused: at 224 x 224 page faults cost as much as the convolutions.
        mallopt = ctypes.CDLL(None).mallopt  # see mallopt(3)
        mallopt(-4, 0)  # M_MMAP_MAX: no block has a mapping of its own
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD, bytes
    if device.type == "cuda":
        # CUDA then computes the same bits each time, so a resumed run ends as it would have.
        torch.backends.cudnn.deterministic = True
        # cuBLAS reads this when it starts. torch needs it for deterministic results.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # An operation without a deterministic kernel only warns. torch.compile times no reductions.
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    torch.set_float32_matmul_precision("high")  # TF32, where the chip has it
    rank, ranks = join_ranks(device)
    # In fp16 the gradient scaler waits for the device in each step.
    can = device.type in GRAPHED and ranks == 1 and dtype != torch.float16 and not compile_model
    if graphs and not can:
        log.info("note       no CUDA graphs: they need one process, a GPU, bf16 or fp32, and no "
                 "--compile")
    if graphs and can and device.type == "cuda":
        # The default stream cannot be captured. All work, before a graph and in it, is on this one.
        torch.cuda.set_stream(torch.cuda.Stream(device))
    return Runtime(device, dtype, compile_model, rank, ranks, graphs and can)


def find_device(name: str) -> torch.device:
    """Return the device of this process that --device names; raises UserError if it is missing."""
    if name == "auto":
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            name = "cuda" if torch.cuda.is_available() else "cpu"
        if caught:
            reason = one_line(caught[0].message)
            remedy = OLDER if re.search(TOO_NEW, reason) else ""
            log.info(f"note       the GPU is not used ({reason[:200]}){remedy}")
    if launched() and name.startswith("cuda:"):
        raise UserError(f"--device {name}: torchrun gives each process a GPU; say --device cuda")
    if launched() and name == "cuda":
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is not None:
            # First of all, or each process would take memory of the first GPU, too.
            torch.cuda.set_device(device)
        # This fails on a chip that this PyTorch does not support.
        torch.ones(1, device=device).sum().item()
        return device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0][:200]
        remedy = OLDER if re.search(TOO_NEW, reason) else "; try --device cpu"
        raise UserError(f"--device {name}: is not available ({reason}){remedy}") from error


def fastest_dtype(device: torch.device) -> torch.dtype:
    """Return the precision that the chip computes fastest in, as far as torch can tell."""
    if device.type == "cuda":
        # The A100, of compute capability 8.0, was the first to compute in bf16.
        has_bf16 = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if has_bf16 else torch.float16
    # torch 2.10 has no get_capabilities().
    abilities = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    has_bf16 = abilities.get("avx512_bf16") or abilities.get("amx_bf16")
    return torch.bfloat16 if has_bf16 else torch.float32


def launched() -> bool:
    """Return whether torchrun started this process."""
    return dist.is_available() and dist.is_torchelastic_launched()


def process_rank() -> int:
    """Return the rank of this process, also before there is a Runtime that knows it."""
    return int(os.environ["RANK"]) if launched() else 0


def join_ranks(device: torch.device) -> tuple[int, int]:
    """Join the other processes of torchrun; return (rank, ranks), which is (0, 1) without it."""
    if not launched():
        return 0, 1
    # torchrun itself leaves one thread to each process. This is Linux only.
    if device.type == "cpu" and hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, cores // int(os.environ["LOCAL_WORLD_SIZE"])))
    # The hosts agree by gloo, which does not wait for the devices. A node that is gone is noticed
    # after the timeout; torchrun notices at once when a process dies.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                            timeout=datetime.timedelta(minutes=10))
    return dist.get_rank(), dist.get_world_size()


def peak_memory(device: torch.device) -> float:
    """Return the peak memory in GB, allocated on CUDA, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    unit = 1 if sys.platform == "darwin" else 1024  # bytes: macOS counts them, others count KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
