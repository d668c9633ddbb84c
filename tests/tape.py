"""A stand-in for CUDA graphs on the CPU: it repeats a step's operations without the step's Python.

As a graph does, it keeps every number that came from Python and the memory of every tensor, draws
random numbers anew, and refuses an operation that hands a value to Python. And as with a graph
nothing has happened after the capture.
"""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves

import engine.graphs
import engine.runtime

# These hand a value to Python, or make a tensor of a size that depends on values.
WAITING = ("aten::_local_scalar_dense", "aten::nonzero")


def tensors(values) -> list[torch.Tensor]:
    """Return the tensors among values, also within lists."""
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def address(tensor: torch.Tensor) -> int:
    """Return the address of a tensor's memory."""
    return tensor.untyped_storage().data_ptr()


class Tape(TorchDispatchMode):
    """The operations of a step, each with its inputs and the tensors that it made."""

    def __init__(self):
        super().__init__()
        self.operations = []
        self.own = set()  # addresses of memory that the step itself took
        self.before = {}  # by address, other memory that it wrote to, and its content before

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.name() in WAITING:
            raise RuntimeError(f"operation not permitted when stream is capturing: {function}")
        for argument, value in zip(function._schema.arguments, args, strict=False):
            # Of the averages of batch norm the schema does not say that they are written.
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            if is_written or argument.name.startswith("running_"):
                for tensor in tensors(value):
                    if address(tensor) not in self.own | self.before.keys():
                        memory = tensor.untyped_storage()
                        self.before[address(tensor)] = memory, memory.clone()
        result = function(*args, **(kwargs or {}))
        inputs = set(map(address, tensors((args, kwargs))))
        made = [tensor if address(tensor) not in inputs else None for tensor in tensors(result)]
        self.own |= {address(tensor) for tensor in made if tensor is not None}
        # What is kept here is never freed, so no memory is taken twice.
        self.operations.append((function, args, kwargs or {}, made))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        """Repeat the operations, in the same memory."""
        for function, args, kwargs, made in self.operations:
            results = tensors(function(*args, **kwargs))
            for old, new in zip(made, results, strict=True):
                if old is not None:
                    old.detach().copy_(new)

    def pool(self) -> None:
        """Return no pool of memory."""


class Waits(TorchDispatchMode):
    """Finds the operations that hand a value to Python."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.name() in WAITING:
            self.found.append(function.name())
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def waits():
    """Do as engine.graphs.waits does."""
    with Waits() as mode:
        yield mode.found


def is_capturing() -> bool:
    """Return whether a tape records at this moment."""
    return any(isinstance(mode, Tape) for mode in _get_current_dispatch_mode_stack())


def capture(step, pool, generators) -> Tape:
    """Do as engine.graphs.capture does."""
    generators = [torch.default_generator, *generators]
    states = [generator.get_state() for generator in generators]
    tape = Tape()
    try:
        with tape:
            step()
    finally:
        for memory, content in tape.before.values():
            memory.copy_(content)
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
    return tape


def stand_in(patch: pytest.MonkeyPatch) -> None:
    """Have runs on the CPU use tapes as their CUDA graphs."""
    patch.setattr(engine.runtime, "GRAPHED", ("cpu",))
    patch.setattr(engine.graphs, "capture", capture)
    patch.setattr(engine.graphs, "waits", waits)
    patch.setattr(torch.cuda, "is_current_stream_capturing", is_capturing)
    patch.setattr(engine.graphs, "device_generator", lambda _: torch.default_generator)
    # Only on CUDA it does not look at the labels' values.
    patch.setattr(torch.nn.functional, "one_hot",
                  lambda labels, classes: torch.eye(classes, dtype=torch.int64)[labels])
    # Here torch's own random numbers of the host are those of the device.
    patch.setattr(engine.graphs, "HOST_RANDOM", engine.graphs.HOST_RANDOM[1:])
