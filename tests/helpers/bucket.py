"""Once imported, Python's file operations are those of a bucket that is mounted as a folder.

A folder is renamed file by file, in any order: each is copied and deleted, or all are copied and then all deleted, with
a pause after each, so that a program can be killed in between. A single file is there whole or not at all. With
LISTED_AFTER=SECONDS in the environment a folder lists a file only so long after it was written; by its name it is
found at once. What libraries do outside Python (TensorStore writes the arrays) stays as it is.
"""

import os
import random
import shutil
import time

PAUSE = 0.01  # seconds
_replace, _listdir, _scandir = os.replace, os.listdir, os.scandir


def rename(source, target):
    if not os.path.isdir(source):
        _copy(source, target)
        os.unlink(source)
        return
    if os.path.isdir(target) and _listdir(target):
        raise FileExistsError(17, "File exists", str(target))
    files = [os.path.join(folder, name) for folder, _, names in os.walk(source) for name in names]
    chance = random.SystemRandom()  # programs that were forked must not all do the same
    chance.shuffle(files)
    one_by_one = chance.random() < 0.5
    for path in files:
        there = os.path.join(target, os.path.relpath(path, source))
        os.makedirs(os.path.dirname(there), exist_ok=True)
        _copy(path, there)
        time.sleep(PAUSE)
        if one_by_one:
            os.unlink(path)
    for path in () if one_by_one else files:
        os.unlink(path)
        time.sleep(PAUSE)
    shutil.rmtree(source)


def _copy(source, target):
    shutil.copyfile(source, f"{target}~")
    _replace(f"{target}~", target)


def _is_listed(path):
    late = float(os.environ.get("LISTED_AFTER", "0"))
    return not late or time.time() - os.lstat(path).st_ctime > late


def listdir(path="."):
    return [name for name in _listdir(path) if isinstance(path, int) or _is_listed(os.path.join(path, name))]


class Entries:
    """What `os.scandir` returns."""

    def __init__(self, path="."):
        with _scandir(path) as found:
            self._left = iter([entry for entry in found if isinstance(path, int) or _is_listed(entry.path)])

    def __iter__(self):
        return self._left

    def __next__(self):
        return next(self._left)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def close(self):
        pass


os.rename = os.replace = rename
os.listdir, os.scandir = listdir, Entries
