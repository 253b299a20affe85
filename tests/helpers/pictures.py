"""Folders of small pictures that differ, for the tests of everything that reads or stores them."""

import numpy as np
from PIL import Image


def write_pictures(folder, names, seed=0, **options):
    """Writes a picture of noise of its own size to every one of these paths below `folder`; returns the paths."""
    rng = np.random.default_rng(seed)
    paths = [folder / name for name in names]
    for number, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (12 + number % 5, 10 + number % 3, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path, **options)
    return paths


def damage(path):
    """Cuts a picture file in half."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
