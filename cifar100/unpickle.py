"""Read the pickles of CIFAR-100's python version without executing anything they ask for."""

import io
import pickletools
from collections.abc import Callable
from pickle import Unpickler, UnpicklingError

import numpy as np

# Bytes of a file and of all that it unpacks to. The official files have 186 MB, or 276 if Python 3
# wrote them by protocol 2.
SIZE_LIMIT = 288 * 2**20
# In a pickle. The official training set has 0.4 million, or 2 with NumPy's numbers in protocol 2.
MOST_OPCODES = 2_200_000
MOST_TUPLES = 10_000  # in a pickle, but for those that are only arguments of a call
INTEGERS = tuple(kind + size for kind in "ui" for size in "1248")


def unpickle(content: bytes, *wanted: str) -> list:
    """Return these values of a pickled dict, arrays of integers and plain containers.

    If the pickle is damaged or holds something else, this raises anything.
    """
    _read_through(content)
    # Byte strings of Python 2 are read as latin-1. Keys can be bytes of Python 3.
    loaded = _IntegerUnpickler(io.BytesIO(content), encoding="latin1").load()
    if not isinstance(loaded, dict):
        raise UnpicklingError("it holds no dict")
    loaded = {key.decode() if isinstance(key, bytes) else key: value
              for key, value in loaded.items()}
    if not set(wanted) <= set(loaded):
        keys = ", ".join(key[:20] for key in loaded if isinstance(key, str))
        raise UnpicklingError(f"it holds {keys[:99]}, not {', '.join(wanted)}")
    values = [loaded[key] for key in wanted]
    return [_array(*value.parts) if isinstance(value, PickledArray) else value for value in values]


def _read_through(content: bytes) -> None:
    """Raise an error if unpickling would cost far more memory or stack than CIFAR-100 does.

    Unpicklers believe what they read: each byte can cost them an empty list, a memo index of 2^31
    costs 32 GB, and the hash of tuples nested a million deep overflows the stack.
    """
    tuples, is_tuple, index, memo = 0, False, 0, {}  # memo: whether what was stored is a tuple
    for count, (opcode, argument, _) in enumerate(pickletools.genops(content)):
        name = opcode.name
        if "PUT" in name or name == "MEMOIZE":
            index = len(memo) if argument is None else int(argument)
            memo[index] = is_tuple  # which stays on top of the stack
        else:
            # A call takes a tuple off the stack, and makes no other of it.
            tuples -= name == "REDUCE" and is_tuple
            is_tuple = "TUPLE" in name or ("GET" in name and memo.get(int(argument), False))
            tuples += is_tuple
        is_set = name in ("EMPTY_SET", "FROZENSET")  # which costs three times as much as a list
        if is_set or tuples > MOST_TUPLES or max(count, index) > MOST_OPCODES:
            raise UnpicklingError("refused, for it holds a set, or too much or too deeply nested")


class PickledArray:
    """Stands in for numpy.ndarray, whose own unpickling could be given a dtype of pointers.

    The array is made later, and only if it is wanted: thousands could share their content.
    """

    def __init__(self, *parts: object):
        self.parts = parts

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, is_fortran, content = state
        self.parts = content, dtype, shape, "F" if is_fortran else "C"


class IntegerDtype:
    """Stands in for numpy.dtype: accepts integers alone, and later only their byte order."""

    def __init__(self, code: str, *_: object):
        if code not in INTEGERS:
            raise UnpicklingError(f"refused, for it holds an array of {code!r}, not of integers")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        if state[1] == ">":
            self.dtype = self.dtype.newbyteorder(">")


def _array(content: bytes | str, dtype: IntegerDtype, shape: tuple, order: str = "C",
           axes: tuple | None = None) -> np.ndarray:
    """Make an array; NumPy 2.3 gives the axes of one of order "K"."""
    if not isinstance(dtype, IntegerDtype):
        raise UnpicklingError("refused, for it holds an array of no known dtype")
    content = content.encode("latin1") if isinstance(content, str) else content
    values = np.frombuffer(content, dtype.dtype)
    return values.reshape(shape).transpose(axes) if axes else values.reshape(shape, order=order)


# What a pickle may call, and what is called instead.
ALLOWED = {
    "numpy.dtype": IntegerDtype,
    "numpy.ndarray": None,  # an argument of _reconstruct, which ignores it
    "numpy.core.multiarray._reconstruct": lambda *_: PickledArray(),
    "numpy.core.multiarray.scalar": lambda dtype, content: int(_array(content, dtype, ())),
    "numpy.core.numeric._frombuffer": PickledArray,  # of protocol 5
    "_codecs.encode": lambda text, _encoding: text,  # Python 3 makes bytes of it, in protocol 2
}


class _IntegerUnpickler(Unpickler):
    def find_class(self, module: str, name: str) -> Callable | None:
        wanted = f"{module}.{name}".replace("numpy._core", "numpy.core")
        if wanted not in ALLOWED:
            raise UnpicklingError(f"refused, for it asks for {module}.{name}")
        return ALLOWED[wanted]
