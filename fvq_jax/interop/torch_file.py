"""Reads tensors from PyTorch (.pt, .pth) and .safetensors files without PyTorch.

PyTorch files are pickles, and a pickle can run any program. Here the pickle may only name tensors, plain
containers, numbers, strings and `argparse.Namespace`. What Lightning's checkpoints hold besides, callbacks and
settings, is replaced by an empty object without looking at it; any other name ends the reading before anything is
called. The callers know what the tensors mean: the other modules of `fvq_jax.interop`.
"""

import collections
import contextlib
import io
import os
import pickle
import pickletools
import types
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import IO, Any

import ml_dtypes
import numpy as np
import safetensors

from fvq_jax.runtime.errors import InputError
from fvq_jax.runtime.paths import require_no_device

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
# The packages of those objects. Nothing of these packages is ever imported.
_BLANK = ("lightning", "lightning_fabric", "pytorch_lightning", "omegaconf", "jsonargparse", "typing")
_BLANK_TYPES = ("bool", "dict", "float", "int", "list", "object", "str", "tuple")  # which settings name
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


def read_tensors(
    path: str | os.PathLike[str], track: Callable[[Iterable[str]], Iterable[str]] = iter
) -> dict[str, np.ndarray]:
    """Every tensor of a .pt, .pth or .safetensors file, by name.

    Names inside nested containers are joined with dots (`model.encoder.conv_in.weight`, `optimizer.state.0.exp_avg`);
    what is no tensor is left out. Shapes and dtypes are the file's. `track` wraps the names in a .safetensors file as
    its tensors are read; it is not used for other files, which are mapped. InputError as for `load_torch_file`, and if
    the file holds no tensor.
    """
    if str(path).endswith(".safetensors"):
        with open_safetensors(path) as file:
            tensors = {name: file.get_tensor(name) for name in track(file.keys())}
    else:
        tensors = dict(named_tensors(load_torch_file(path)))
    if not tensors:
        raise InputError(f"{path} holds no tensors")
    return tensors


def tensor_names(path: str | os.PathLike[str]) -> list[str]:
    """The names of the tensors that `read_tensors` gives; reads no tensor. InputError as for `load_torch_file`."""
    if str(path).endswith(".safetensors"):
        with open_safetensors(path) as file:
            return list(file.keys())
    return [name for name, _ in named_tensors(load_torch_file(path))]


def load_torch_file(path: str | os.PathLike[str]) -> Any:
    """The object that `torch.save` wrote to `path`, tensors as numpy arrays, a Namespace as a SimpleNamespace.

    Both formats are read: the zip of PyTorch 1.6 and later, whose arrays are read-only and mapped from the file (read
    when touched, so it must stay in place), and the earlier one (torchvision's VGG16), which is read whole. bfloat16
    is ml_dtypes.bfloat16; tensors that share storage share memory. InputError, in one line, if the file is missing,
    damaged, in neither format, or names a Python object beyond tensors and plain containers.
    """
    require_no_device(path)
    try:
        with open(path, "rb") as file:
            is_zip = file.read(4) == b"PK\x03\x04"
            file.seek(0)
            return _load_zip(path, file) if is_zip else _load_legacy(path, file)
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise InputError(
            f"{path} is damaged or not written by torch.save ({type(error).__name__}: {_one_line(error)}); "
            "if PyTorch loads it, save it again with a current torch.save"
        ) from error


def named_tensors(tree: Any, name: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """The tensors in nested containers, named as by `read_tensors`."""
    if isinstance(tree, np.ndarray):
        yield name, tree
    elif isinstance(tree, Mapping | list | tuple):
        items = tree.items() if isinstance(tree, Mapping) else enumerate(tree)
        for key, value in items:
            yield from named_tensors(value, f"{name}.{key}" if name else str(key))


def require(tensors: Mapping[str, np.ndarray], keys: Iterable[str], source: str | os.PathLike[str]) -> None:
    """Raises InputError, naming up to four of the missing ones, unless `tensors` read from `source` has all `keys`."""
    keys = list(keys)
    missing = [key for key in keys if key not in tensors]
    if missing:
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        raise InputError(f"{source} lacks {', '.join(missing[:4])}{more} (of {len(keys)} needed tensors)")


def _load_zip(path: str | os.PathLike[str], file: io.BufferedReader) -> Any:
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        pickles = [name for name in entries if name.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1:
            raise InputError(f"{path} is a zip file, but not one of torch.save: it has no data.pkl")
        folder = pickles[0].removesuffix("data.pkl")
        byte_order = f"{folder}byteorder"
        if byte_order in entries and archive.read(byte_order) != b"little":
            raise InputError(f"{path} was saved on a big-endian machine; save it again on a little-endian one")
        storages: dict[str, np.ndarray] = {}

        def storage(key: str, dtype: np.dtype, count: int) -> np.ndarray:
            if key not in storages:
                storages[key] = _entry_bytes(path, file, archive, entries[f"{folder}data/{key}"])
            return storages[key][: count * dtype.itemsize].view(dtype)

        with archive.open(pickles[0]) as stream:
            _check_memo(stream)
            return _Unpickler(stream, path, storage).load()


def _entry_bytes(
    path: str | os.PathLike[str], file: io.BufferedReader, archive: zipfile.ZipFile, entry: zipfile.ZipInfo
) -> np.ndarray:
    """The bytes of one zip entry, mapped if they are stored as they are (torch.save always does), else read."""
    if entry.compress_type != zipfile.ZIP_STORED or not entry.file_size:
        return np.frombuffer(archive.read(entry), np.uint8)
    # The lengths of name and extra field in the local header differ from the central directory's: alignment padding.
    file.seek(entry.header_offset + 26)
    name_and_extra = np.frombuffer(file.read(4), "<u2").sum(dtype=int)
    offset = entry.header_offset + 30 + int(name_and_extra)
    return np.memmap(path, np.uint8, "r", offset, (entry.file_size,)).view(np.ndarray)


def _load_legacy(path: str | os.PathLike[str], file: io.BufferedReader) -> Any:
    size = os.fstat(file.fileno()).st_size
    storages: dict[str, np.ndarray] = {}

    def storage(key: str, dtype: np.dtype, count: int) -> np.ndarray:
        if count * dtype.itemsize > size:
            raise ValueError(f"{count} elements of {dtype} cannot be in {size} bytes")
        if key not in storages:
            storages[key] = np.empty(count, dtype)
        return storages[key]

    def unpickle() -> Any:
        _check_memo(file)
        return _Unpickler(file, path, storage).load()

    if unpickle() != _LEGACY_MAGIC:
        raise ValueError("wrong magic number")
    unpickle()  # version of the format: only 1001 was ever written
    if not unpickle()["little_endian"]:
        raise InputError(f"{path} was saved on a big-endian machine; save it again on a little-endian one")
    result = unpickle()
    for key in unpickle():  # their bytes follow the pickles, in this order
        values = storages[key]
        count = int.from_bytes(file.read(8), "little")
        if count != values.size or file.readinto(values.view(np.uint8).data) != values.nbytes:
            raise ValueError(f"storage {key} is cut off")
    return result


def _check_memo(file: Any) -> None:
    """Raises ValueError if the pickle that begins here numbers an object higher than it has objects.

    Python's table of numbered objects grows to the highest number, so that five damaged bytes could fill all memory.
    """
    start = file.tell()
    for count, (operation, number, _) in enumerate(pickletools.genops(file)):
        if operation.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(number or 0) > count:
            raise ValueError(f"its object {count} has the number {number}")
    file.seek(start)


class _Unpickler(pickle.Unpickler):
    """Rebuilds tensors and plain containers, and refuses every other name."""

    def __init__(
        self, file: IO[bytes] | io.BufferedIOBase, path: Any, storage: Callable[[str, np.dtype, int], np.ndarray]
    ):
        super().__init__(file, encoding="utf-8")
        self._path = path
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGES:
            return name
        admitted = {
            "argparse.Namespace": types.SimpleNamespace,
            "builtins.set": set,
            "__builtin__.set": set,
            "collections.OrderedDict": collections.OrderedDict,
            "collections.defaultdict": lambda *_: {},
            "torch.Size": tuple,
            "torch._utils._rebuild_parameter": self._rebuild_parameter,
            "torch._utils._rebuild_tensor": self._rebuild_tensor,
            "torch._utils._rebuild_tensor_v2": self._rebuild_tensor,
            "torch.nn.parameter.Parameter": _Parameter,
        }
        builtin = module in ("builtins", "__builtin__") and name in _BLANK_TYPES
        if builtin or module.partition(".")[0] in _BLANK:
            return _Blank
        if f"{module}.{name}" not in admitted:
            raise InputError(
                f"{self._path} holds a {module}.{name}, which is not loaded because it could run code; "
                "save only tensors, dictionaries and numbers, for instance model.state_dict()"
            )
        return admitted[f"{module}.{name}"]

    def persistent_load(self, pid: Any) -> np.ndarray:
        _, storage_name, key, _, count, *view = pid
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


class _Blank:
    """Stands for any object of the packages in `_BLANK`: takes whatever a pickle does to an object, keeps nothing."""

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, _: Any) -> None:
        pass

    def __setitem__(self, *_: Any) -> None:
        pass

    def append(self, _: Any) -> None:
        """Takes an item of a pickled list."""

    def extend(self, _: Any) -> None:
        """Takes items of a pickled list."""


class _Parameter(np.ndarray):
    """A parameter as PyTorch before 0.4 pickled it: its tensor, then a state about gradients that has no use here."""

    def __new__(cls, data: np.ndarray, *_: Any) -> "_Parameter":
        return np.asarray(data).view(cls)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        del state


@contextlib.contextmanager
def open_safetensors(path: str | os.PathLike[str]) -> Iterator[Any]:
    """A .safetensors file, open for reading. InputError if it is missing or damaged."""
    require_no_device(path)
    try:
        with safetensors.safe_open(path, "np") as file:
            yield file
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or _one_line(error)}") from error
    except safetensors.SafetensorError as error:
        raise InputError(f"{path} is damaged or not a safetensors file ({_one_line(error)})") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
