"""Folders of picture files as a source."""

import array
import collections
import errno
import hashlib
import os
import re
import stat
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
from absl import logging

from fvq_jax.data.record import Record
from fvq_jax.runtime.errors import InputError

# Of all formats that `decode` reads, however their files are called.
ENDINGS = (".jpg", ".jpeg", ".jfif", ".jpe", ".png", ".webp", ".bmp", ".gif")
_NAMED = 5  # endings in a message, at most


class FolderSource:
    """Every JPEG, PNG, WebP, BMP and GIF file of a directory tree, in the same order on every machine; or one file.

    The class of a file is the first folder on its way from `root`; classes are numbered in the order of
    their names. Files directly in `root` form a class of their own, number 0. Symbolic links are followed, hidden files
    and folders ignored; how many files of other types there are, and of which, is said in the log.

    The whole tree is listed at once, and the size of every file is read. Names are kept as one string of bytes: 1.3
    million Python strings would take several times as much memory, in every worker process.

    Raises InputError for a root that is not a readable folder or holds no picture.
    """

    def __init__(self, root: str | os.PathLike[str]):
        self._root = os.path.abspath(root)
        only = ""
        if os.path.isfile(self._root) and self._root.lower().endswith(ENDINGS):
            self._root, only = os.path.split(self._root)
        elif not os.path.isdir(self._root):
            raise InputError(f"image folder {str(root)!r} does not exist or is not a folder")
        names, ends, labels, sizes = bytearray(), array.array("q"), array.array("i"), array.array("q")
        classes, beside, digest = {"": 0}, array.array("q"), hashlib.sha256()
        others: collections.Counter[str] = collections.Counter()
        for name, size in [(only, os.path.getsize(root))] if only else _image_files(self._root, others):
            folder = name.split(os.sep, 1)[0] if os.sep in name else ""
            if not folder:
                beside.append(len(ends))
            labels.append(classes.setdefault(folder, len(classes)))
            encoded = os.fsencode(name)
            names += encoded
            ends.append(len(names))
            sizes.append(size)
            digest.update(_line(encoded, size))
        if not ends:
            raise InputError(
                f"image folder {str(root)!r} holds no file that ends in one of {', '.join(ENDINGS)}"
                + (f", but {others.total():,} others: {_most_frequent(others)}" if others else "")
            )
        if others:
            logging.warning(
                "%s: leaves out %s: %s; pictures are %s",
                self._root,
                f"{others.total():,} file{'s' if others.total() > 1 else ''}",
                _most_frequent(others),
                " ".join(ENDINGS),
            )
        self._names, self._ends, self._sizes = bytes(names), np.array(ends, np.int64), np.array(sizes, np.int64)
        # Without files directly in the root, the classes of the folders begin at 0.
        self._labels = np.array(labels, np.int32) - (0 if beside else 1)
        self.classes = list(classes)[0 if beside else 1 :]
        self._digest = digest.hexdigest()[:16]
        if beside and len(self.classes) > 1:
            logging.warning(
                "%s holds pictures beside its class folders: %d of them, such as %r, become class 0",
                self._root,
                len(beside),
                self.relative_name(beside[0]),
            )

    def __getstate__(self) -> dict[str, Any]:
        # Workers take no fingerprint.
        return self.__dict__ | {"_sizes": np.zeros(0, np.int64)}

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> Record:
        with open(self.name(index), "rb") as file:
            return {"image": file.read(), "label": np.int32(self.label(index))}

    def label(self, index: int) -> int:
        """Class of file `index`."""
        return int(self._labels[index])

    def name(self, index: int) -> str:
        """Full path of file `index`."""
        return os.path.join(self._root, self.relative_name(index))

    def relative_name(self, index: int) -> str:
        """Path of file `index` below the root."""
        start = self._ends[index - 1] if index else 0
        return os.fsdecode(self._names[start : self._ends[index]])

    def fingerprint(self) -> str:
        """How many files, and a hash of their names below the root, in order, and of their sizes."""
        return f"{len(self)} files, names and sizes {self._digest}"

    def fingerprint_without(self, left_out: Collection[str]) -> str:
        """The fingerprint of the files but those with these relative names, whether they are there or not."""
        digest, count, without = hashlib.sha256(), 0, frozenset(left_out)
        for index in range(len(self)):
            name = self.relative_name(index)
            if name not in without:
                digest.update(_line(os.fsencode(name), int(self._sizes[index])))
                count += 1
        return f"{count} files, names and sizes {digest.hexdigest()[:16]}"


def _line(name: bytes, size: int) -> bytes:
    """What a file adds to a fingerprint."""
    return b"%s\0%d\n" % (name, size)


def _most_frequent(others: collections.Counter[str]) -> str:
    """How many files of each ending there are, the most frequent endings first: ".txt 50, .tiff 3, more 7"."""
    shown = others.most_common(_NAMED)
    rest = others.total() - sum(count for _, count in shown)
    return ", ".join(f"{ending} {count:,}" for ending, count in [*shown, *([("more", rest)] if rest else [])])


def _ending(name: str) -> str:
    """The ending of a file's name, in small letters; names that only look as if they had one have "no ending"."""
    found = re.fullmatch(r"\.[a-z]\w{0,7}", os.path.splitext(name)[1].lower())
    return found[0] if found else "no ending"


def _image_files(root: str, others: collections.Counter[str]) -> Iterator[tuple[str, int]]:
    """Path below `root` and size of all files that look like pictures, sorted by the parts of their paths.

    A broken link has size -1, so that it is named among the unreadable files and not left out in silence. The endings
    of all other files are counted in `others`.
    """

    def below(folder: str, prefix: str, way: tuple[str, ...]) -> Iterator[tuple[str, int]]:
        """`way` holds the real paths of the folders from the root to this one."""
        try:
            with os.scandir(folder) as found:
                entries = sorted((entry for entry in found if not entry.name.startswith(".")), key=lambda e: e.name)
        except OSError as error:
            raise InputError(f"cannot read folder {folder!r}: {error.strerror}") from error
        for entry in entries:
            name = prefix + entry.name
            if _is_folder(entry):
                real = os.path.realpath(entry.path)
                if not (entry.is_symlink() and _holds_one_of(real, way)):  # else an endless walk
                    yield from below(entry.path, name + os.sep, (*way, real))
            elif entry.name.lower().endswith(ENDINGS):
                try:
                    status = entry.stat()
                except OSError:
                    yield name, -1
                    continue
                if stat.S_ISREG(status.st_mode):  # reading a pipe would wait for ever
                    yield name, status.st_size
            else:
                others[_ending(entry.name)] += 1

    return below(root, "", (os.path.realpath(root),))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP:  # a link to itself leads nowhere
            return False
        raise InputError(f"cannot read folder {entry.path!r}: {error.strerror}") from error


def _holds_one_of(folder: str, others: tuple[str, ...]) -> bool:
    """Whether one of the others is this folder or lies in it; all are real paths."""
    return any(os.path.commonpath((folder, other)) == folder for other in others)
