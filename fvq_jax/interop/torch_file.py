"""Reads tensors from PyTorch (.pt, .pth) and .safetensors files without PyTorch.

PyTorch files are pickles; `torch_pickle` reads those, and runs nothing that they name. The callers know what the
tensors mean: the other modules of `fvq_jax.interop`.
"""

import io
import os
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from absl import logging

from fvq_jax.interop.safetensors_files import is_safetensors, read_safetensors, safetensors_names
from fvq_jax.interop.torch_pickle import StandIn, Unpickler, check_memo, stood_for
from fvq_jax.runtime.errors import InputError, one_line
from fvq_jax.runtime.paths import require_content

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_MOST_VALUES = 10_000_000  # in nested containers: shared ones count every time, so a small file could hold any number
_SHOWN = 5  # kinds of objects in a message


def read_tensors(
    path: str | os.PathLike[str], track: Callable[[Iterable[str]], Iterable[str]] = iter
) -> dict[str, np.ndarray]:
    """Every tensor of a .pt, .pth or .safetensors file, or of the parts that an index names, by name.

    Names inside nested containers are joined with dots (`model.encoder.conv_in.weight`, `optimizer.state.0.exp_avg`);
    what is no tensor is left out. Shapes and dtypes are the file's. `track` wraps the names in a .safetensors file as
    its tensors are read; it is not used for other files, which are mapped. InputError as for `load_torch_file` and
    `read_safetensors`, and if the file holds no tensor.
    """
    if not is_safetensors(path):
        return named_tensors(load_torch_file(path), path)
    tensors = read_safetensors(path, track)
    if not tensors:
        raise InputError(f"{path} holds no tensors")
    return tensors


def tensor_names(path: str | os.PathLike[str]) -> list[str]:
    """The names of the tensors that `read_tensors` gives; reads no tensor. InputError as for `load_torch_file`."""
    if is_safetensors(path):
        return safetensors_names(path)
    return list(named_tensors(load_torch_file(path), path))


def load_torch_file(path: str | os.PathLike[str]) -> Any:
    """The object that `torch.save` wrote to `path`, with tensors as numpy arrays.

    Both formats are read: the zip of PyTorch 1.6 and later, whose arrays are read-only and mapped from the file (read
    when touched, so it must stay in place), and the earlier one (torchvision's VGG16), which is read whole. bfloat16
    is ml_dtypes.bfloat16; tensors that share storage share memory. A Namespace is a SimpleNamespace, a path is text, a
    number of numpy a number of Python; every other object is a `StandIn`, or a class of it. InputError, in one line, if
    the file is missing, damaged or in neither format, or holds tensors in an unusual form.
    """
    require_content(path)
    kinds: dict[str, type[StandIn]] = {}
    try:
        with open(path, "rb") as file:
            is_zip = file.read(4) == b"PK\x03\x04"
            file.seek(0)
            content = _load_zip(path, file, kinds) if is_zip else _load_legacy(path, file, kinds)
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise InputError(
            f"{path} is damaged or not written by torch.save ({type(error).__name__}: {one_line(error)}); "
            "if PyTorch loads it, save it again with a current torch.save"
        ) from error
    if kinds:
        logging.info("%s: left out is what is no tensor: %s", path, _few([k.dotted for k in kinds.values()]))
    return content


def named_tensors(content: Any, path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The tensors in the nested containers that were loaded from `path`, named as by `read_tensors`.

    InputError if there is none, or if the containers hold themselves or one another without end.
    """
    tensors: dict[str, np.ndarray] = {}
    objects: dict[str, None] = {}
    try:
        for number, (name, value) in enumerate(_values(content)):
            if isinstance(value, np.ndarray):
                tensors[name] = value
            elif kind := stood_for(value):
                objects[kind] = None
            if number == _MOST_VALUES:
                raise InputError(f"{path} holds more than {_MOST_VALUES:,} values")
    except RecursionError:
        raise InputError(f"{path} is damaged: its containers hold themselves, or too many one another") from None
    if not tensors:
        only = f", only objects that are not loaded ({_few(objects)}): save model.state_dict()" if objects else ""
        raise InputError(f"{path} holds no tensors{only}")
    return tensors


def _values(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Everything in nested containers and the containers themselves, by name."""
    yield name, tree
    if isinstance(tree, Mapping | list | tuple):
        items = tree.items() if isinstance(tree, Mapping) else enumerate(tree)
        for key, value in items:
            yield from _values(value, f"{name}.{key}" if name else str(key))


def _few(names: Collection[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(list(names)[:_SHOWN])}{more}"


def require(tensors: Mapping[str, np.ndarray], keys: Iterable[str], source: str | os.PathLike[str]) -> None:
    """Raises InputError, naming up to four of the missing ones, unless `tensors` read from `source` has all `keys`."""
    keys = list(keys)
    missing = [key for key in keys if key not in tensors]
    if missing:
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        raise InputError(f"{source} lacks {', '.join(missing[:4])}{more} (of {len(keys)} needed tensors)")


def _load_zip(path: str | os.PathLike[str], file: io.BufferedReader, kinds: dict[str, type[StandIn]]) -> Any:
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
            check_memo(stream)
            return Unpickler(stream, path, storage, kinds).load()


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


def _load_legacy(path: str | os.PathLike[str], file: io.BufferedReader, kinds: dict[str, type[StandIn]]) -> Any:
    size = os.fstat(file.fileno()).st_size
    storages: dict[str, np.ndarray] = {}

    def storage(key: str, dtype: np.dtype, count: int) -> np.ndarray:
        if count * dtype.itemsize > size:
            raise ValueError(f"{count} elements of {dtype} cannot be in {size} bytes")
        if key not in storages:
            storages[key] = np.empty(count, dtype)
        return storages[key]

    def unpickle() -> Any:
        check_memo(file)
        return Unpickler(file, path, storage, kinds).load()

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
