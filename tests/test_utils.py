"""What all else builds on: errors and exit statuses, numbers, files, and where to compute."""

import argparse
import os
import pickle
import re
import sys
import warnings
import zipfile
from contextlib import suppress

import numpy as np
import pytest
import torch
import torch._inductor.config
from helpers import call, contents, equal

import cifar100.unpickle
import engine.flags
import engine.process
import engine.runtime
import models
import utils
from engine.runtime import Runtime, choose_runtime
from utils import DamagedFile, UserError

CPU = torch.device("cpu")
SMALLER = "try a smaller --batch-size"


@pytest.mark.parametrize("error, line, status", [
    (UserError("a\n mistake"), "a mistake", 2),
    (UserError("stopped", utils.STOPPED), "stopped", 75),
    (DamagedFile("not whole"), "not whole", 2),
    (torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB"),
     f"out of GPU memory: {SMALLER}", 2),
    (MemoryError(), f"out of memory: {SMALLER}", 2),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), f"out of memory: {SMALLER}", 2),
    (torch.AcceleratorError("CUDA error: unspecified launch failure\nFor debugging consider"),
     "the GPU failed (CUDA error: unspecified launch failure); the same command with --resume goes "
     "on", 1),
    (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), "the GPU failed (cuDNN error: "
     "CUDNN_STATUS_EXECUTION_FAILED); the same command with --resume goes on", 1),
    (OSError(28, "No space left"), "cannot go on: [Errno 28] No space left", 1),
    (KeyboardInterrupt(), "interrupted", 130),
])
def test_what_can_go_wrong_is_one_line_and_a_status(error, line, status):
    assert engine.process.explain(error) == (line, status)


@pytest.mark.parametrize("flag", ["--eval-only", "--predict", "--predict=tiger.jpg"])
@pytest.mark.parametrize("error, line, status", [
    (torch.OutOfMemoryError("CUDA out of memory."), "out of GPU memory", 2),
    (MemoryError(), "out of memory", 2),
    (torch.AcceleratorError("CUDA error: unspecified launch failure"),
     "the GPU failed (CUDA error: unspecified launch failure)", 1),
])
def test_no_flag_of_training_is_advised_for_a_finished_model(
        monkeypatch, flag, error, line, status):
    monkeypatch.setattr(sys, "argv", ["train_resnet.py", flag])
    assert engine.process.explain(error) == (line, status)


@pytest.mark.parametrize("error", [
    ZeroDivisionError(), torch.AcceleratorError("CUDA error: device-side assert triggered")])
def test_a_fault_of_the_code_is_not_explained_away(error):
    with pytest.raises(type(error)):
        engine.process.explain(error)


def stop() -> None:
    """Fail as a run does that is stopped."""
    raise UserError("stopped\nin epoch 1", utils.STOPPED)


def test_a_script_that_fails_prints_one_line_on_stderr_and_exits_with_its_status():
    process = call(engine.process.run_script, stop)
    assert (process.returncode, process.stdout) == (75, "")
    assert process.stderr.endswith(": stopped in epoch 1\n") and process.stderr.count("\n") == 1


@pytest.mark.parametrize("kind, text, value", [
    (int, "1", 1), (int, "9", 9), (float, "1", 1.0), (float, "2.5e0", 2.5)])
def test_a_number_within_its_bounds_is_read(kind, text, value):
    number = engine.flags.bounded(kind, 1, 9)(text)
    assert number == value and type(number) is kind


@pytest.mark.parametrize("text", ["0.99", "9.01", "nan", "inf", "-inf"])
def test_a_number_outside_its_bounds_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match=f"{text} is not between 1 and 9"):
        engine.flags.bounded(float, 1, 9)(text)


@pytest.mark.parametrize("maximum", [(9,), ()])
def test_a_whole_number_beyond_all_floats_is_refused(maximum):
    with pytest.raises(argparse.ArgumentTypeError, match="is not between 0 and"):
        engine.flags.bounded(int, 0, *maximum)("9" * 400)


@pytest.mark.parametrize("kind, text, name", [(int, "2.5", "whole number"), (float, "x", "number")])
def test_what_is_no_number_is_named_as_argparse_does(kind, text, name):
    convert = engine.flags.bounded(kind, 1)
    assert convert.__name__ == name, "argparse prints: invalid ... value"
    with pytest.raises(ValueError, match=text):
        convert(text)


def test_a_file_is_replaced_whole_and_the_old_one_can_be_kept(tmp_path):
    new, old = tmp_path / "new", tmp_path / "old"
    utils.write_atomically(new, b"first", previous=old)
    assert contents(tmp_path) == {"new": b"first"}
    utils.write_atomically(new, b"second", previous=old)
    utils.write_atomically(new, b"third")
    assert contents(tmp_path) == {"new": b"third", "old": b"first"}


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_write_that_fails_leaves_what_was_there_and_nothing_else(tmp_path, monkeypatch, function):
    (tmp_path / "file").write_bytes(b"old")

    def fail(*_):
        raise OSError(28, "No space left")

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(OSError, match="No space left"):
        utils.write_atomically(tmp_path / "file", b"new")
    assert contents(tmp_path) == {"file": b"old"}


STATE = {"weights": torch.arange(6.0).view(2, 3), "step": 3, "names": ["a", "b"],
         "nested": {"half": torch.ones(2, dtype=torch.bfloat16), "none": None}}


def test_tensors_and_plain_containers_are_read_as_they_were_written(tmp_path):
    utils.save_tensors(tmp_path / "state.pt", STATE)
    assert equal(utils.load_tensors(tmp_path / "state.pt"), STATE)
    torch.save(STATE, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert equal(utils.load_tensors(str(tmp_path / "old.pt")), STATE), "of before PyTorch 1.6"


@pytest.mark.parametrize("name, says", [("missing", "no such file"), (".", "is a directory")])
def test_a_file_of_tensors_that_cannot_be_opened_is_not_called_damaged(tmp_path, name, says):
    with pytest.raises(UserError, match=says) as caught:
        utils.load_tensors(tmp_path / name)
    assert type(caught.value) is UserError and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("error", [
    MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to")])
def test_a_file_that_does_not_fit_in_memory_is_not_called_damaged(tmp_path, monkeypatch, error):
    """Else a resumed run would put the checkpoint before it in its place."""
    def fail(*_, **__):
        raise error

    utils.save_tensors(tmp_path / "state.pt", STATE)
    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(UserError, match="asks for more memory than there is") as caught:
        utils.load_tensors(tmp_path / "state.pt")
    assert type(caught.value) is UserError


def test_a_damaged_length_that_asks_for_any_memory_is_damage(tmp_path):
    """A first byte makes a checkpoint look like a file of before PyTorch 1.6: a long string."""
    utils.save_tensors(tmp_path / "state.pt", STATE)
    content = (tmp_path / "state.pt").read_bytes()
    (tmp_path / "state.pt").write_bytes(b"\x8e" + content[1:])
    with pytest.raises(DamagedFile):
        utils.load_tensors(tmp_path / "state.pt")


class Call:
    """Its pickle calls os.system."""

    def __reduce__(self):
        return os.system, ("true",)


def spoil(path, fault: str) -> None:
    """Put a damaged or an unwanted file in the place of a file of tensors."""
    whole = path.read_bytes()
    if fault == "changed":
        position = whole.index(STATE["weights"].numpy().tobytes())
        path.write_bytes(whole[:position] + b"\x01" + whole[position + 1 :])
    elif fault == "compressed":
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in members.items():
                archive.writestr(name, content)
    elif fault in ("list", "call"):
        torch.save([torch.zeros(1)] if fault == "list" else {"a": Call()}, path)
    else:
        path.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "text": b"<html>"}[fault])


@pytest.mark.parametrize("fault, says", [
    ("cut", "not a PyTorch file, or a damaged one"),
    ("empty", "not a PyTorch file, or a damaged one"),
    ("text", "not a PyTorch file, or a damaged one"),
    ("changed", "not a PyTorch file, or a damaged one"),
    ("compressed", "not a PyTorch file, or a damaged one"),
    ("list", "holds a list, not a dict of tensors"),
    ("call", "refused, for it holds more than tensors"),
])
def test_a_damaged_or_unwanted_file_of_tensors_is_named(tmp_path, fault, says):
    path = tmp_path / "state.pt"
    utils.save_tensors(path, STATE)
    spoil(path, fault)
    with pytest.raises(DamagedFile, match=f"{path}: {says}"):
        utils.load_tensors(path)


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_gives_arrays_of_uint8_by_names_that_are_text(protocol):
    array = np.arange(6, dtype=np.uint8).reshape(2, 3)
    content = pickle.dumps({b"data": array, "labels": [1, 2]}, protocol)
    data, labels = cifar100.unpickle.unpickle(content, "data", "labels")
    assert np.array_equal(data, array) and labels == [1, 2]


def print_lock(path) -> None:
    """Print whether this process gets the lock on a file."""
    with open(path) as file:
        print(utils.try_lock(file))


def test_one_process_holds_a_lock_until_it_closes_the_file(tmp_path):
    with open(tmp_path / "lock", "w") as file:
        assert utils.try_lock(file)
        assert call(print_lock, tmp_path / "lock").stdout == "False\n"
    assert call(print_lock, tmp_path / "lock").stdout == "True\n"


def test_where_there_are_no_locks_everyone_gets_one(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with open(tmp_path / "lock", "w") as file:
        assert utils.try_lock(file)


@pytest.fixture
def gpu(monkeypatch):
    """Have torch believe that there is a GPU; returns a function that sets its capability."""
    monkeypatch.setattr(torch, "ones", lambda *_, **__: torch.zeros(1))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)

    def of_capability(*capability):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    yield of_capability
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("capability, expected", [
    ((7, 0), torch.float16),  # V100
    ((7, 5), torch.float16),  # T4
    ((8, 0), torch.bfloat16),  # A100
    ((9, 0), torch.bfloat16),  # H100
])
def test_each_gpu_generation_gets_what_it_computes_fast(gpu, capability, expected):
    gpu(*capability)
    assert choose_runtime("cuda", "auto", False).dtype == expected
    assert choose_runtime("cuda", "fp32", False).dtype == torch.float32


@pytest.mark.parametrize("capabilities, precision", [
    ({"avx512_bf16": True}, torch.bfloat16), ({"amx_bf16": True}, torch.bfloat16),
    ({"avx512_f": True}, torch.float32), ({}, torch.float32),
])
def test_a_cpu_that_computes_in_bf16_does(monkeypatch, capabilities, precision):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert choose_runtime("cpu", "auto", False).dtype == precision
    assert choose_runtime("cpu", "fp32", False).dtype == torch.float32


def test_nothing_is_compiled_unless_asked_for(gpu):
    gpu(8, 0)
    assert [choose_runtime("cuda", "auto", compile_model).compile
            for compile_model in (False, True)] == [False, True]


def test_each_process_of_torchrun_gets_a_gpu_of_its_own(gpu, monkeypatch):
    """What torchrun says of the process is read when it is asked for, not at the import."""
    assert (engine.runtime.launched(), engine.runtime.process_rank()) == (False, 0)
    gpu(8, 0)
    monkeypatch.setattr(engine.runtime, "join_ranks", lambda device: (5, 8))
    for name, value in (("TORCHELASTIC_RUN_ID", "run"), ("RANK", "5"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert (engine.runtime.launched(), engine.runtime.process_rank()) == (True, 5)
    runtime = choose_runtime("cuda", "auto", False)
    assert (str(runtime.device), runtime.rank, runtime.ranks) == ("cuda:1", 5, 8)


def test_under_torchrun_a_gpu_is_not_named(monkeypatch):
    """Or all processes would share it."""
    for name, value in (("TORCHELASTIC_RUN_ID", "run"), ("RANK", "1"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(utils.UserError, match="--device cuda:1: torchrun gives each process a GPU"):
        choose_runtime("cuda:1", "auto", False)


def test_the_gpu_is_chosen_before_it_is_used(monkeypatch):
    """Else each process takes memory of the first GPU, which an exclusive one refuses."""
    calls = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(str(device)))
    monkeypatch.setattr(torch, "ones", lambda *_, **__: calls.append("used") or torch.zeros(1))
    engine.runtime.find_device("cuda:1")
    assert calls == ["cuda:1", "used"]


def test_a_cpu_may_have_a_number():
    assert engine.runtime.find_device("cpu:0") == torch.device("cpu", 0)


TOO_OLD = ("The NVIDIA driver on your system is too old (found version 12020). Please update your "
           "GPU driver by downloading and installing a new version from the URL: ...")
NO_KERNEL = "CUDA error: no kernel image is available for execution on the device\nCUDA kernel ..."


@pytest.mark.parametrize("reason", [TOO_OLD, NO_KERNEL])
def test_a_torch_too_new_for_the_gpu_is_told_with_its_remedy(monkeypatch, reason):
    def fail(*_, **__):
        raise RuntimeError(reason)

    monkeypatch.setattr(torch, "ones", fail)
    with pytest.raises(utils.UserError) as caught:
        engine.runtime.find_device("cuda")
    message = str(caught.value)
    assert message.endswith("; install a torch for CUDA 12 (README.md, 'Install'), or say "
                            "--device cpu")
    assert reason.partition("\n")[0][:60] in message and "\n" not in message


def test_by_default_a_gpu_with_an_old_driver_is_not_used_and_a_line_says_so(monkeypatch, caplog):
    """Without it a user would wait for the CPU and wonder."""
    def is_available():
        warnings.warn(f"CUDA initialization: {TOO_OLD} (Triggered internally)", stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    with caplog.at_level("INFO"), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert engine.runtime.find_device("auto") == CPU
    (line,) = caplog.messages
    assert line.startswith("note       the GPU is not used (CUDA initialization: The NVIDIA driver")
    assert "install a torch for CUDA 12" in line and "\n" not in line


def test_on_cuda_kernels_are_deterministic(gpu):
    gpu(8, 0)
    choose_runtime("cuda", "auto", False)
    assert torch.backends.cudnn.deterministic
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def compile_without_a_compiler(directory: str) -> None:
    """Train a compiled block for a step where there is no C++ compiler."""
    def main():
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = directory
        torch._inductor.config.cpp.cxx = (None, f"{directory}/no compiler")
        runtime = Runtime(CPU, torch.float32, compile=True)
        # A network of torch's own classes alone is left uncompiled by torch 2.10.
        runtime.place(models.BasicBlock(3, 4))(torch.ones(1, 3, 8, 8)).sum().backward()

    engine.process.run_script(main)


def test_a_compiler_that_fails_ends_compile_with_one_line(tmp_path):
    process = call(compile_without_a_compiler, str(tmp_path))
    assert (process.returncode, process.stderr.count("\n")) == (2, 1), process.stderr
    assert ": --compile failed (" in process.stderr and "C++" in process.stderr
    assert process.stderr.endswith("; leave it out\n")


@pytest.mark.parametrize("precision", engine.runtime.PRECISIONS)
def test_a_precision_sets_autocast_and_scaler(precision):
    runtime = Runtime(CPU, engine.runtime.PRECISIONS[precision])
    with runtime.autocast():
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == runtime.dtype and runtime.precision == precision
    assert runtime.scaler().is_enabled() == (precision == "fp16")


@pytest.mark.parametrize("compile_model", [False, True])
def test_a_placed_model_keeps_its_state(runtime, compile_model):
    """Its weights are laid out channels last, and compilation changes no name in model.pt."""
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    placed = runtime._replace(compile=compile_model).place(model)
    assert equal(before, dict(placed.state_dict()))
    assert placed[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_a_runtime_says_what_it_is():
    text = str(Runtime(CPU, torch.bfloat16, compile=True, ranks=2))
    assert text == f"2 x CPU, {torch.get_num_threads()} threads, bfloat16, compiled"


def test_the_peak_memory_counts_what_is_resident():
    block = np.ones(200 * 2**20, np.uint8)
    peak = engine.runtime.peak_memory(CPU)
    assert 0.2 < peak < 100, block.nbytes
    # Linux counts the same in KiB.
    with suppress(OSError), open("/proc/self/status") as file:
        for kibibytes in re.findall(r"^VmHWM:\s+(\d+) kB", file.read(), re.MULTILINE):
            assert peak == pytest.approx(int(kibibytes) * 1024 / 1e9, rel=0.01)
