"""Read the pickles of CIFAR-100's python version without executing anything they ask for."""

import io
import pickletools
from collections.abc import Callable
from pickle import Unpickler, UnpicklingError

import numpy as np

SIZE_LIMIT = 256 * 2**20  # bytes, of a file and of all that it unpacks to; the official has 186 MB
MOST_OPCODES = 1_000_000  # in a pickle; the official training set has 0.4 million
MOST_TUPLES = 10_000  # in a pickle


def unpickle(content: bytes) -> dict:
    """Return a pickled dict of Uint8Arrays and plain containers; if damaged, raises anything."""
    # Unpicklers believe what they read: each byte can cost them an empty list, a memo index of 2^31
    # costs 32 GB, and the hash of tuples nested a million deep overflows the stack. So read through
    # the pickle before anything is built from it.
    tuples = 0
    for count, (opcode, argument, _) in enumerate(pickletools.genops(content)):
        if "TUPLE" in opcode.name:
            tuples += 1
        memo_index = int(argument) if "PUT" in opcode.name else 0
        if tuples > MOST_TUPLES or max(count, memo_index) > MOST_OPCODES:
            raise UnpicklingError("refused, for it is too large or too deeply nested")
    # Byte strings of Python 2 are read as latin-1. Keys can be bytes of Python 3.
    loaded = _Uint8Unpickler(io.BytesIO(content), encoding="latin1").load()
    return {k.decode() if isinstance(k, bytes) else k: value for k, value in loaded.items()}


class Uint8Array(np.ndarray):
    """Forces uint8: a pickle could otherwise set dtype object, which reads bytes as pointers."""

    def __setstate__(self, state: tuple) -> None:
        _, shape, _, fortran_order, content = state
        super().__setstate__((1, shape, np.dtype(np.uint8), fortran_order, content))


class Uint8Dtype:
    """Stands in for numpy.dtype: accepts uint8 alone, and ignores later changes."""

    def __init__(self, code: str, *_: object):
        if code not in ("u1", "|u1", "uint8"):
            raise UnpicklingError(f"refused, for it holds an array of {code!r}, not of uint8")

    def __setstate__(self, state: tuple) -> None:
        pass


class _Uint8Unpickler(Unpickler):
    encoded = 0  # bytes made so far: a short pickle could ask for the same ones many times

    def find_class(self, module: str, name: str) -> Callable | None:
        allowed = {
            "numpy.dtype": Uint8Dtype,
            "numpy.ndarray": None,  # an argument of _reconstruct, which ignores it
            "numpy.core.multiarray._reconstruct": lambda *_: Uint8Array(0, np.uint8),
            "_codecs.encode": self._encode,  # Python 3 makes bytes of it
        }
        wanted = f"{module}.{name}".replace("numpy._core", "numpy.core")
        if wanted not in allowed:
            raise UnpicklingError(f"refused, for it asks for {module}.{name}")
        return allowed[wanted]

    def _encode(self, text: str, _encoding: str) -> bytes:
        self.encoded += len(text)
        if self.encoded > SIZE_LIMIT:
            raise UnpicklingError("refused, for it is larger than all of CIFAR-100")
        return text.encode("latin1")
