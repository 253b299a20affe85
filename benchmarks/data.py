"""Pictures per second from JPEG files to batches of floats, beside a PyTorch DataLoader that makes the same crops.

  python benchmarks/data.py --workers=2 --markdown

The files are crops of the photographs bundled with scikit-image and scikit-learn, about 500 x 375 pixels, JPEG of
quality 85 to 95, and stay in the system's cache. Crops are the paper's: shorter side to 256..320, a random square of
256, half of them mirrored; a batch is float32 in [-1, 1]. Every program has `--workers` worker processes and is
limited to as many cores, which its main process shares; figures per core are divided by that number.
"""

import argparse
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.processes import Worker, alternate, machine, median_ratio, write_rows

METHODS = ("folder", "array_record", "torch")
COLUMNS = {
    "method": "method",
    "workers": "workers and cores",
    "images_per_second": "images / s",
    "per_core": "per core",
    "over_torch": "over torch",
    "status": "",
}
PHOTOS = ("astronaut", "chelsea", "coffee", "rocket", "retina", "hubble_deep_field")


def write_pictures(folder: Path, count: int) -> None:
    """That many JPEG files in ten class folders."""
    import skimage.data
    import sklearn.datasets

    photos = [getattr(skimage.data, name)() for name in PHOTOS] + list(sklearn.datasets.load_sample_images().images)
    rng = np.random.default_rng(0)
    for index in range(count):
        photo = Image.fromarray(photos[index % len(photos)])
        width, height = (int(side) for side in np.array((500, 375)) * rng.uniform(0.85, 1.15))
        if rng.random() < 0.25:
            width, height = height, width
        scale = rng.uniform(0.6, 1) * min(photo.width / width, photo.height / height)
        left, top = rng.uniform(0, photo.width - scale * width), rng.uniform(0, photo.height - scale * height)
        box = (left, top, left + scale * width, top + scale * height)
        path = folder / f"{index % 10}/{index:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo.resize((width, height), Image.Resampling.BICUBIC, box).save(path, quality=int(rng.integers(85, 96)))


def load_jax(source: str, root: str, size: int, batch: int, images: int, workers: int) -> Any:
    """Our pipeline; see `processes.py` for what is returned."""
    _hold_to(workers)
    os.environ["JAX_PLATFORMS"] = "cpu"  # both leave their batches in the host's memory
    import jax
    from absl import flags

    from fvq_jax.data.pipeline import train_batches
    from fvq_jax.data.sources import make_source
    from fvq_jax.ops.pixels import to_float

    flags.FLAGS.mark_as_parsed()  # Grain hands them to its worker processes

    def build():
        batches = train_batches(
            make_source(source, "train", image_size=size, train_dir=root),
            image_size=size,
            resize_min=size,
            resize_max=size * 5 // 4,
            flip=True,
            batch_size=batch,
            seed=0,
            num_workers=workers,
        )
        convert = jax.jit(to_float)
        return _runs((jax.block_until_ready(convert(each["image"])) for each in batches), batch, images, workers)

    return build


def load_torch(root: str, size: int, batch: int, images: int, workers: int) -> Any:
    """The same in PyTorch, in the way of the public training programs."""
    _hold_to(workers)
    import torch
    from torch.utils.data import DataLoader, RandomSampler

    def build():
        torch.manual_seed(0)
        data = TorchFolder(root, size)
        order = RandomSampler(data, num_samples=2**31)  # many epochs, without a pause between them
        return _runs(iter(DataLoader(data, batch, sampler=order, num_workers=workers)), batch, images, workers)

    return build


class TorchFolder:
    """A data set of (float32 tensor [3, H, W] in [-1, 1], class) by Pillow, as torchvision's ImageFolder."""

    def __init__(self, root: str, size: int):
        self._files = sorted(Path(root).rglob("*.jpg"))
        self._size = size

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        import torch

        with open(self._files[index], "rb") as file:
            image = Image.open(file).convert("RGB")
        pixels = self._random_crop(image)
        if random.random() < 0.5:
            pixels = pixels[:, ::-1]
        tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1).contiguous().to(torch.float32).div(255)
        return tensor.sub_(0.5).div_(0.5), int(self._files[index].parent.name)

    def _random_crop(self, image: Image.Image) -> np.ndarray:
        size = self._size
        side = random.randint(size, size * 5 // 4)
        while min(image.size) >= 2 * side:
            image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
        scale = side / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        pixels = np.array(image)
        top, left = (random.randint(0, length - size) for length in pixels.shape[:2])
        return pixels[top : top + size, left : left + size]


def _hold_to(cores: int) -> None:
    """Keeps this process and its children on that many cores, and allows it to have children."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    multiprocessing.current_process().daemon = False


def _runs(batches: Iterator, batch: int, images: int, workers: int) -> dict[str, Callable]:
    """`take` is timed; `drain`, before it, takes the batches that were made while other programs ran."""

    def take(count):
        for _ in range(count):
            next(batches)

    return {"drain": lambda: take(4 * workers), "take": lambda: take(max(1, images // batch))}


def compare(args: argparse.Namespace, folder: Path) -> list[dict]:
    """One row per method, the methods alternating."""
    write_pictures(folder / "pictures", args.pictures)
    if "array_record" in args.methods:
        command = [sys.executable, "-m", "fvq_jax.data.prepare", folder / "pictures", folder / "records"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=Path(__file__).parents[1])
    common = (args.size, args.batch, args.images, args.workers)
    programs = {
        "folder": ("jax", load_jax, "folder", str(folder / "pictures")),
        "array_record": ("jax", load_jax, "array_record", str(folder / "records")),
        "torch": ("torch", load_torch, str(folder / "pictures")),
    }
    shared = {"size": args.size, "batch": args.batch, "workers": args.workers, **machine()}
    rows, workers = {method: {"method": method, "status": "", **shared} for method in args.methods}, {}
    for method, row in rows.items():
        if method == "torch" and find_spec("torch") is None:
            row["status"] = "torch is not installed"
        else:
            workers[method] = Worker(*programs[method], *common)
    seconds = alternate(workers, ["drain", "take"], args.rounds)
    for method, worker in workers.items():
        mine, row = seconds[method, "take"], rows[method]
        row["images_per_second"] = round(max(1, args.images // args.batch) * args.batch / statistics.median(mine), 1)
        row["per_core"] = round(row["images_per_second"] / args.workers, 1)
        if "torch" in workers:
            row["over_torch"] = round(median_ratio(seconds["torch", "take"], mine), 3)
        worker.close()
    return list(rows.values())


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The options; ends the program if they cannot work."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join(METHODS), help=f"default: {','.join(METHODS)}")
    parser.add_argument("--workers", type=int, default=1, help="worker processes and cores of each (default: 1)")
    parser.add_argument("--images", type=int, default=2048, help="in one round (default: 2048)")
    parser.add_argument("--pictures", type=int, default=512, help="files (default: 512)")
    parser.add_argument("--batch", type=int, default=32, help="default: 32")
    parser.add_argument("--size", type=int, default=256, help="side of a crop (default: 256)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default: 5)")
    parser.add_argument("--markdown", action="store_true", help="a table after the rows")
    args = parser.parse_args(argv)
    args.methods = args.methods.split(",")
    if unknown := set(args.methods) - set(METHODS):
        parser.error(f"unknown method {unknown.pop()!r}: use {', '.join(METHODS)}")
    if not 1 <= args.workers <= (cores := len(os.sched_getaffinity(0))):
        parser.error(f"--workers={args.workers} needs as many cores, and this machine has {cores}")
    if args.pictures < args.batch:
        parser.error(f"--pictures={args.pictures} do not fill a batch of {args.batch}")
    return args


def main() -> None:
    """Measures and writes the rows."""
    args = parse()
    with tempfile.TemporaryDirectory() as folder:
        rows = compare(args, Path(folder))
    write_rows(rows, COLUMNS, args.markdown)


if __name__ == "__main__":
    main()
