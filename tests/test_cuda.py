"""What must hold on a GPU: `pytest -m cuda` runs the list, here and in other files.

Without a GPU these tests are skipped. So that they are not broken themselves, the same code also
runs on the CPU, and what depends on CUDA runs on torch's fake devices.
"""

import functools
import re
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from faults import at_batch, kill
from helpers import IS_TORCH_2_10, ROOT, call, needs_cuda, result, script, without_pictures
from test_ranks import join
from torch._subclasses.fake_tensor import FakeTensorMode

import engine.optim
import engine.runtime
import utils
from engine.runtime import Runtime

cuda, slow = pytest.mark.cuda, pytest.mark.slow
PRECISIONS = tuple(engine.runtime.PRECISIONS)
# Dropout draws random numbers in each step, with which a resumed run must go on.
SMALL = {"train_resnet": ["--dropout", "0.1"],
         "finetune_resnet18": ["--weights", "random", "--image-size", "64"]}
both = pytest.mark.parametrize("name", SMALL)
on_both_devices = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=[cuda, needs_cuda])])
MOST_MEMORY = 5.7  # GB, of one K20X


def skip_without_bf16(precision: str) -> None:
    """Skip where the GPU does not compute in bf16."""
    if precision == "bf16" and engine.runtime.fastest_dtype(torch.device("cuda")) != torch.bfloat16:
        pytest.skip("this GPU does not compute in bf16")


def train(name, output_dir, *flags, before=without_pictures):
    """Train a script for a moment; a run that is there goes on."""
    flags = [*SMALL[name], *flags, "--resume", "--output-dir", output_dir]
    return script(name, *flags, before=before)


def kill_and_resume(name, data_dir, tmp_path, *flags) -> tuple:
    """Return the results of an undisturbed run, and of one that is killed in its second epoch."""
    flags = ["--data-dir", data_dir, "--batch-size", 16, "--epochs", 3, "--low-res", 0.5, *flags]
    whole = train(name, tmp_path / "whole", *flags)
    assert (whole.returncode, whole.stderr) == (0, "")
    flags += ["--checkpoint-minutes", 0]
    # Two steps and an evaluation are an epoch.
    killed = train(name, tmp_path / "run", *flags, before=functools.partial(at_batch, 5, kill))
    assert killed.returncode == -9
    resumed = train(name, tmp_path / "run", *flags)
    assert (resumed.returncode, resumed.stderr) == (0, "")
    assert "resume     after 1 epochs" in resumed.stdout
    return result(tmp_path / "whole"), result(tmp_path / "run")


@both
@pytest.mark.parametrize("device, precision", [
    ("cpu", "fp32"), pytest.param("cpu", "bf16", marks=slow),
    *(pytest.param("cuda", precision, marks=[cuda, needs_cuda]) for precision in PRECISIONS),
])
def test_a_killed_run_ends_with_the_same_bits(name, device, precision, data_dir, tmp_path):
    if device == "cuda":
        skip_without_bf16(precision)
    # The last epoch is without CutMix.
    flags = ["--device", device, "--precision", precision, "--cutmix", 0.5, "--trivial-augment",
             0.5, "--epochs", 4]
    whole, resumed = kill_and_resume(name, data_dir, tmp_path, *flags)
    assert whole == resumed


@both
@pytest.mark.parametrize("device, precision", [
    pytest.param("cpu", "fp32", marks=slow),
    *(pytest.param("cuda", precision, marks=[cuda, needs_cuda]) for precision in PRECISIONS),
])
def test_a_killed_run_that_is_compiled_ends(name, device, precision, data_dir, tmp_path):
    """The same bits are not promised. On the CPU torch 2.14 gives them, and 2.10 does not."""
    if device == "cuda":
        skip_without_bf16(precision)
    flags = ["--device", device, "--precision", precision, "--compile"]
    whole, resumed = kill_and_resume(name, data_dir, tmp_path, *flags)
    print(f"{name}, {device}, {precision}, compiled: the same bits: {whole == resumed}")
    assert len(whole[1]) == len(resumed[1]) == 3, "epochs"
    if device == "cpu" and not IS_TORCH_2_10:
        assert whole == resumed


@both
@on_both_devices
def test_a_run_goes_on_where_it_did_not_begin(name, device, data_dir, tmp_path):
    """A GPU's checkpoint on a CPU, and the reverse. Without a GPU it is only marked as a GPU's."""
    first = ["--data-dir", data_dir, "--batch-size", 16, "--epochs", 1, "--precision", "fp32"]
    stopped = train(name, tmp_path, *first, "--device", device, "--max-minutes", 0.001,
                    before=tag_as_cuda if device == "cpu" else without_pictures)
    assert stopped.returncode == utils.STOPPED
    other = "cuda" if device == "cpu" and torch.cuda.is_available() else "cpu"
    resumed = train(name, tmp_path, *first, "--device", other)
    assert (resumed.returncode, resumed.stderr) == (0, "")
    assert ("will not be the same bits" in resumed.stdout) == (device != other)
    assert "final test accuracy" in resumed.stdout


def tag_as_cuda() -> None:
    """Have torch.save write that each tensor lay on the first GPU."""
    without_pictures()
    torch.serialization.location_tag = lambda storage: "cuda:0"


@cuda
@needs_cuda
@both
def test_the_defaults_fit_a_small_gpu(name, tmp_path):
    """In float32 at the default batch and size, as far as torch allocates and reserves memory."""
    flags = ["--dataset", "synthetic", "--device", "cuda", "--precision", "fp32", "--epochs", 1]
    weights = ["--weights", "random"] if name == "finetune_resnet18" else []
    # No --image-size: 224 x 224 in part 2.
    process = script(name, *flags, *weights, "--low-res", 0, "--output-dir", tmp_path,
                     before=report_reserved)
    assert process.returncode == 0, process.stderr
    allocated = float(re.search(r"peak memory (\S+) GB", process.stdout)[1])
    reserved = float(re.search(r"reserved (\S+) GB", process.stdout)[1])
    print(f"{name}: {allocated:.2f} GB allocated, {reserved:.2f} GB reserved")
    assert 0.2 < allocated <= reserved < MOST_MEMORY


def report_reserved() -> None:
    """Print the most memory that torch reserved when the last line is printed."""
    without_pictures()
    peak_memory = engine.runtime.peak_memory

    def peak(device):
        print(f"reserved {torch.cuda.max_memory_reserved(device) / 1e9} GB")
        return peak_memory(device)

    engine.runtime.peak_memory = peak


@pytest.mark.parametrize("device, precision", [
    pytest.param("cpu", "fp32", marks=slow),
    *(pytest.param("cuda", precision, marks=[cuda, needs_cuda]) for precision in PRECISIONS),
])
def test_the_loss_falls(device, precision, tmp_path):
    if device == "cuda":
        skip_without_bf16(precision)
    process = train("train_resnet", tmp_path, "--dataset", "synthetic", "--epochs", 2,
                    "--low-res", 0.5, "--batch-size", 50, "--device", device, "--precision",
                    precision)
    assert (process.returncode, process.stderr) == (0, "")
    first, last = (float(loss) for loss in re.findall(r"train loss (\S+)", process.stdout))
    accuracy = float(re.search(r"final test accuracy (\S+)%", process.stdout)[1])
    assert last < first and accuracy > 60


@cuda
@needs_cuda
def test_too_large_a_batch_is_one_line(tmp_path):
    process = train("finetune_resnet18", tmp_path, "--dataset", "synthetic", "--device", "cuda",
                    "--batch-size", 5000, "--image-size", 1024, "--low-res", 0)
    assert process.returncode == utils.USER_ERROR
    assert process.stderr.endswith("out of GPU memory: try a smaller --batch-size\n")


@cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
@pytest.mark.parametrize("images", [64, 16])
def test_two_gpus_train_stop_and_resume(images, tmp_path):
    """By NCCL, with so many images a rank: plain batch norm, and below 32 the synchronised one."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
               ROOT / "train_resnet.py", "--dataset", "synthetic", "--device", "cuda", "--epochs",
               1, "--max-steps", 20, "--batch-size", 2 * images, "--resume", "--output-dir"]
    command = list(map(str, [*command, tmp_path]))
    for flags in (["--max-minutes", "0.001"], []):
        process = subprocess.run([*command, *flags], capture_output=True, text=True)
        assert process.returncode == 0, process.stderr
        assert "Grad strides" not in process.stderr
    assert "2 x cuda" in process.stdout and "final test accuracy" in process.stdout


def print_dtypes() -> None:
    """Print the dtypes of a step's parts under CUDA's autocast, on tensors without values."""
    torch.cuda.is_available = torch.cuda.is_bf16_supported = lambda *_, **__: True
    with FakeTensorMode(allow_non_fake_inputs=True):
        for dtype in (torch.bfloat16, torch.float16):
            runtime = Runtime(torch.device("cuda"), dtype)
            # Without a gradient, for which torch would start a thread for the GPU.
            with runtime.autocast():
                logits = torch.nn.functional.linear(torch.ones(4, 8, device="cuda"),
                                                    torch.ones(100, 8, device="cuda"))
            labels = torch.zeros(4, dtype=torch.int64, device="cuda")
            loss = torch.nn.functional.cross_entropy(logits.float(), labels)
            matrix = engine.optim.orthogonalize(torch.ones(2, 8, 8, device="cuda"), runtime.dtype)
            print(logits.dtype, loss.dtype, matrix.dtype)


@pytest.mark.skipif(IS_TORCH_2_10 and not torch.cuda.is_available(),
                    reason="the fake CUDA of torch 2.10 needs a GPU's driver")
def test_the_matrices_are_of_16_bits_on_cuda_and_the_loss_of_32():
    process = call(print_dtypes)
    assert process.returncode == 0, process.stderr
    expected = [f"{half} torch.float32 {half}" for half in ("torch.bfloat16", "torch.float16")]
    assert process.stdout.splitlines() == expected


def agree_by_gloo() -> None:
    """Join a group of one whose CUDA backend computes nothing, and let its ranks agree."""
    join(0, 1, 29555)
    init = dist.init_process_group
    dist.init_process_group = lambda backends, **keywords: init(
        backends.replace("nccl", "fake"), **keywords)
    import torch.testing._internal.distributed.fake_pg

    rank, _ = engine.runtime.join_ranks(torch.device("cuda"))
    # It believes in a second rank, so it asks the group.
    runtime = Runtime(torch.device("cpu"), torch.float32, rank=rank, ranks=2)
    print(runtime.reduce(torch.tensor([3.0])).item(), runtime.broadcast({"a": 1}),
          runtime.gather("b")[0])


def test_what_the_hosts_agree_on_goes_by_gloo_beside_nccl():
    process = call(agree_by_gloo)
    assert process.returncode == 0, process.stderr
    # torch 2.10 has gloo print lines of its own.
    lines = [line for line in process.stdout.splitlines() if not line.startswith("[Gloo]")]
    assert lines == ["3.0 {'a': 1} b"]
