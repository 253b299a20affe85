"""The pickles in PyTorch's files, read without PyTorch and without running anything that they name.

A pickle is a program: it may call whatever can be imported. Here nothing that it names is imported or called, so it
does not matter what that is. A few names have an equivalent of our own: what makes tensors and plain containers, and
values that are easily given as plain ones (paths, numpy's numbers). Every other name becomes a class of `StandIn`.
"""

import collections
import pathlib
import pickle
import pickletools
import re
import types
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from fvq_jax.runtime.errors import InputError

# PyTorch stores numbers in the byte order of its machine. Big-endian files are refused, so "<" is right.
_STORAGES = {
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "BoolStorage": np.dtype("?"),
    "ByteStorage": np.dtype("u1"),
    "CharStorage": np.dtype("i1"),
    "ComplexDoubleStorage": np.dtype("<c16"),
    "ComplexFloatStorage": np.dtype("<c8"),
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "IntStorage": np.dtype("<i4"),
    "LongStorage": np.dtype("<i8"),
    "ShortStorage": np.dtype("<i2"),
}
# Functions that make tensors (of 8 bits, sparse, quantized, ...). A stand-in for one would be a tensor that is missing.
_MAKES_TENSORS = re.compile(r"torch\.[\w.]*\b_(rebuild|load_from)_\w+")
_PATHS = re.compile(r"pathlib\.(?:_local\.)?(?:Pure)?(Posix|Windows)Path")
_PLAIN_SCALARS = re.compile(r"[<>|=](b1|[iu][1248]|f[248]|c8|c16|U\d{1,4})")  # of numpy, which have a plain value
MOST_KINDS = 1000  # of stand-ins in a file: each is a class, which takes far more memory than its name in the file
_NAME_LENGTH = 100  # of a dotted name that is kept


class StandIn:
    """Stands for an object that is not made: takes whatever a pickle does to an object, and keeps nothing of it.

    Attributes:
      dotted: what the file names, in one line of ASCII.
    """

    __slots__ = ()
    dotted = ""

    def __init__(self, *_: Any, **__: Any):
        pass

    def __call__(self, *_: Any, **__: Any) -> "StandIn":
        """What comes out of a method or function of it: nothing that is looked at either."""
        return self

    def __setstate__(self, *_: Any) -> None:
        pass

    def __setitem__(self, *_: Any) -> None:
        pass

    def add(self, _: Any) -> None:
        """Takes an item of a pickled set."""

    def append(self, _: Any) -> None:
        """Takes an item of a pickled list."""

    def extend(self, _: Any) -> None:
        """Takes items of a pickled list."""


def stood_for(value: Any) -> str:
    """What a `StandIn`, or a class of it, stands for; empty for everything else."""
    return value.dotted if isinstance(value, StandIn) or _is_kind(value) else ""


def _is_kind(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, StandIn)


class Unpickler(pickle.Unpickler):
    """Rebuilds tensors and plain containers; stand-ins take the place of all other objects.

    Args:
      file: at the start of a pickle.
      path: of the file, for messages.
      storage: gives at least so many numbers of the dtype, the content of the storage with this key.
      kinds: the classes of stand-ins by what the file names; new ones are added.
    """

    def __init__(
        self,
        file: Any,
        path: Any,
        storage: Callable[[str, np.dtype, int], np.ndarray],
        kinds: dict[str, type[StandIn]],
    ):
        super().__init__(file, encoding="utf-8")
        self._path = path
        self._storage = storage
        self._kinds = kinds
        self._ours: dict[str, Any] = {
            "_codecs.encode": _Function(_encode),
            "argparse.Namespace": types.SimpleNamespace,
            "builtins.set": set,
            "__builtin__.set": set,
            "collections.OrderedDict": collections.OrderedDict,
            "collections.defaultdict": _Function(lambda *_: {}),
            "numpy.dtype": _DType,
            "numpy.core.multiarray.scalar": _Function(_scalar),
            "numpy._core.multiarray.scalar": _Function(_scalar),
            "torch.Size": tuple,
            "torch._tensor._rebuild_from_type_v2": _Function(self._rebuild_from_type),
            "torch._utils._rebuild_parameter": _Function(self._rebuild_parameter),
            "torch._utils._rebuild_parameter_with_state": _Function(self._rebuild_parameter),
            "torch._utils._rebuild_tensor": _Function(self._rebuild_tensor),
            "torch._utils._rebuild_tensor_v2": _Function(self._rebuild_tensor),
            "torch.nn.parameter.Parameter": _Parameter,
        }

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a name in the file. InputError for one that makes tensors in a form that is not read."""
        dotted = f"{module}.{name}"
        if module == "torch" and name in _STORAGES:
            return name
        if dotted in self._ours:
            return self._ours[dotted]
        if found := _PATHS.fullmatch(dotted):
            return _Function(_posix_path if found[1] == "Posix" else _windows_path)
        if _MAKES_TENSORS.fullmatch(dotted):
            raise InputError(
                f"{self._path} holds tensors in a form that is not read ({dotted[:_NAME_LENGTH]}): save them as plain "
                "ones, dense and of common types"
            )
        if dotted not in self._kinds:
            if len(self._kinds) == MOST_KINDS:
                raise InputError(
                    f"{self._path} names more than {MOST_KINDS} kinds of Python objects: save only tensors, "
                    "dictionaries and numbers, for instance model.state_dict()"
                )
            shown = dotted.encode("unicode_escape").decode()[:_NAME_LENGTH]
            self._kinds[dotted] = type("StandIn", (StandIn,), {"__slots__": (), "dotted": shown})
        return self._kinds[dotted]

    def persistent_load(self, pid: Any) -> Any:
        """A storage; or, from the earlier format, the class of a module, with whose source it was saved."""
        if pid[0] == "module":
            return pid[1]
        _, storage_name, key, _, count, *view = pid
        if _is_kind(storage_name):
            raise InputError(
                f"{self._path} holds tensors of a type that is not read ({storage_name.dotted}): save them as float32"
            )
        values = self._storage(key, _STORAGES[storage_name], count)
        if view and view[0] is not None:  # earliest files: a window of another storage
            _, offset, length = view[0]
            values = values[offset : offset + length]
        return values

    def _rebuild_tensor(
        self, storage: np.ndarray, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any
    ) -> np.ndarray:
        # as_strided checks nothing: without this a crafted file reads the memory behind the storage.
        last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        if min(offset, *shape, *strides, 0) < 0 or (0 not in shape and last >= storage.size):
            raise ValueError(f"a tensor of shape {tuple(shape)} reaches beyond its {storage.size} stored values")
        if 0 in shape:
            return np.empty(shape, storage.dtype)
        bytes_per_step = [s * storage.itemsize for s in strides]
        return np.lib.stride_tricks.as_strided(storage[offset:], shape, bytes_per_step)

    def _rebuild_parameter(self, data: np.ndarray, *_: Any) -> np.ndarray:
        return data

    def _rebuild_from_type(self, function: Any, _: Any, arguments: tuple[Any, ...], *__: Any) -> np.ndarray:
        """A tensor of another class, or with attributes: the class and the attributes are left out."""
        if not isinstance(function, _Function):
            raise ValueError("a tensor of another class is made by an unknown function")
        return function(*arguments)


def check_memo(file: Any) -> None:
    """Raises ValueError if the pickle that begins here numbers an object higher than it has objects.

    Python's table of numbered objects grows to the highest number, so that five damaged bytes could fill all memory.
    """
    start = file.tell()
    for count, (operation, number, _) in enumerate(pickletools.genops(file)):
        if operation.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(number or 0) > count:
            raise ValueError(f"its object {count} has the number {number}")
    file.seek(start)


class _Function:
    """A function of ours that a pickle may call and cannot change: it may set attributes of everything."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]):
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setstate__(self, *_: Any) -> None:
        pass


class _Parameter(np.ndarray):
    """A parameter as PyTorch before 0.4 pickled it: its tensor, then a state about gradients that has no use here."""

    def __new__(cls, data: np.ndarray, *_: Any) -> "_Parameter":
        return np.asarray(data).view(cls)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        del state


class _DType(StandIn):
    """A dtype of numpy, as far as `_scalar` needs it."""

    dotted = "numpy.dtype"
    text: Any = ""
    order: Any = "="

    def __init__(self, text: Any = "", *_: Any):
        self.text = text

    def __setstate__(self, state: Any = (), *_: Any) -> None:
        if isinstance(state, tuple) and len(state) > 1:
            self.order = state[1]


class _OtherScalar(StandIn):
    """A scalar of numpy that has no plain value, such as a date."""

    dotted = "numpy.core.multiarray.scalar"


def _scalar(dtype: Any = None, data: Any = None, *_: Any) -> Any:
    """The plain value of a scalar of numpy: a number, a truth value or text."""
    known = isinstance(dtype, _DType) and isinstance(dtype.text, str) and isinstance(dtype.order, str)
    if known and isinstance(data, bytes) and _PLAIN_SCALARS.fullmatch(dtype.order + dtype.text):
        kind = np.dtype(dtype.order + dtype.text)
        if len(data) == kind.itemsize > 0:
            return np.frombuffer(data, kind)[0].item()
    return _OtherScalar()


def _encode(text: Any = None, encoding: Any = None, *_: Any) -> Any:
    """Bytes, which older pickles hold as text in which every character is a byte."""
    return text.encode("latin-1") if isinstance(text, str) and encoding == "latin1" else StandIn()


def _posix_path(*parts: str) -> str:
    return str(pathlib.PurePosixPath(*parts))


def _windows_path(*parts: str) -> str:
    return str(pathlib.PureWindowsPath(*parts))
