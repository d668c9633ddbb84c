"""Read the pickles of CIFAR-100's python version without executing anything they ask for."""

import io
import pickle
import pickletools
import re
from collections.abc import Callable

import numpy as np

SIZE_LIMIT = 256 * 2**20  # bytes, of a file and of all that it unpacks to; the official has 186 MB
MOST_OPCODES = 1_000_000  # in a pickle; the official training set has 0.4 million
MOST_TUPLES = 10_000  # in a pickle
# A pickle of CIFAR-100 may call these, and _codecs.encode, of which Python 3 makes bytes.
ALLOWED = re.compile(r"numpy (dtype|ndarray)|numpy\._?core\.multiarray _reconstruct|"
                     r"_codecs encode")


class Refused(pickle.UnpicklingError):
    """A pickle asks for something that CIFAR-100 does not need."""


def unpickle(content: bytes) -> dict:
    """Return a pickled dict of Uint8Arrays and plain containers whose keys are str.

    Strings of Python 2 are read as latin-1. Raises UnpicklingError, or for a damaged one anything.
    """
    _check_size(content)
    loaded = _Uint8Unpickler(io.BytesIO(content), encoding="latin1").load()
    return {k.decode() if isinstance(k, bytes) else k: value for k, value in loaded.items()}


def _check_size(content: bytes) -> None:
    """Read through a pickle, before anything is built from it; raises Refused or ValueError.

    Unpicklers believe what they read: each byte can cost them an empty list, a memo index of 2^31
    costs 32 GB, and the hash of tuples nested a million deep overflows the stack.
    """
    tuples = 0
    for count, (opcode, argument, _) in enumerate(pickletools.genops(content)):
        if "TUPLE" in opcode.name:
            tuples += 1
        memo_index = int(argument) if "PUT" in opcode.name else 0
        if tuples > MOST_TUPLES or max(count, memo_index) > MOST_OPCODES:
            raise Refused("refused, for it is too large or too deeply nested")


class Uint8Array(np.ndarray):
    """Forces uint8: a pickle could otherwise set dtype object, which reads bytes as pointers."""

    def __setstate__(self, state: tuple) -> None:
        _, shape, _, fortran_order, content = state
        super().__setstate__((1, shape, np.dtype(np.uint8), fortran_order, content))


class Uint8Dtype:
    """Stands in for numpy.dtype: accepts uint8 alone, and ignores later changes."""

    def __init__(self, code: str, *_: object):
        if code not in ("u1", "|u1", "uint8"):
            raise Refused(f"refused, for it holds an array of {code!r}, not of uint8")

    def __setstate__(self, state: tuple) -> None:
        pass


class _Uint8Unpickler(pickle.Unpickler):
    encoded = 0  # bytes made so far: a short pickle could ask for the same ones many times

    def find_class(self, module: str, name: str) -> Callable:
        if not ALLOWED.fullmatch(f"{module} {name}"):
            raise Refused(f"refused, for it asks for {module}.{name}")
        # numpy.ndarray is only ever an argument of _reconstruct, which is not looked at.
        return {"dtype": Uint8Dtype, "encode": self._encode,
                "_reconstruct": lambda *_: Uint8Array(0, np.uint8)}.get(name)

    def _encode(self, text: str, _encoding: str) -> bytes:
        self.encoded += len(text)
        if self.encoded > SIZE_LIMIT:
            raise Refused("refused, for it is larger than all of CIFAR-100")
        return text.encode("latin1")
