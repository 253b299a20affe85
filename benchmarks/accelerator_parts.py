"""The parts of `accelerator.py`: which benchmark each one is, at which sizes, and how long it may take."""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

# Parts whose name starts so -> the benchmark, which says what the columns of a table are.
COLUMNS_OF = {
    "versions": "chip",
    "search": "chip_search",
    "step": "train_step",
    "generator": "generator_step",
    "sampling": "sampling",
    "training": "short_training",
}
LEAST = 20  # seconds without which no part is started
BATCHES = ((120, 128), (60, 64), (30, 32), (0, 16))  # GiB of memory, images of 256 pixels in a step
TINY_STEP = {
    "tokenizer.ch_mult": "(1,)",
    "tokenizer.quantizer.codebook_size": 64,
    "tokenizer.quantizer.bridge": "linear",
    "data.image_size": 16,
    "adversarial.ndf": 8,
    "loss.perceptual_weight": 1.0,
}


class Part(NamedTuple):
    """A part: its name, the most seconds it may take, and the arguments of Python for the seconds that it gets."""

    name: str
    limit: float
    command: Callable[[float], list[str]]


def parts(args: argparse.Namespace, out: Path, rows: list[dict[str, Any]]) -> Iterator[Part]:
    """The parts that were asked for, in order; `rows` are those known when a part is about to start.

    ValueError for an unknown part.
    """
    known = {
        "versions": (60, lambda seconds: ["benchmarks/chip.py"]),
        "search_262144": (110, lambda seconds: search(args, 262144)),
        "step_fvq16k": (170, lambda seconds: step(args, "fvq16k", rows)),
        "step_fvq262k": (170, lambda seconds: step(args, "fvq262k", rows)),
        "search_16384": (60, lambda seconds: search(args, 16384)),
        "search_1048576": (90, lambda seconds: search(args, 1048576)),
        "generator_step": (120, lambda seconds: generator_step(args)),
        "sampling": (110, lambda seconds: sampling(args, "fvq_jax,transformers")),
        "sampling_compiled": (110, lambda seconds: sampling(args, "transformers_compiled")),
        "training": (1e9, lambda seconds: training(args, out, rows, seconds)),
    }
    chosen = args.parts.split(",") if args.parts else list(known)
    if unknown := [name for name in chosen if name not in known]:
        raise ValueError(f"unknown part {unknown[0]!r}: choose from {', '.join(known)}")
    for name in chosen:
        yield Part(name, *known[name])


def search(args: argparse.Namespace, codes: int) -> list[str]:
    """The search of 8,192 tokens of 256 dimensions."""
    tiny = ["--codes=512", "--dim=8", "--tokens=32", "--rounds=2", "--least=0.01"]
    return ["benchmarks/chip_search.py", *(tiny if args.tiny else [f"--codes={codes}"])]


def step(args: argparse.Namespace, config: str, rows: list[dict[str, Any]]) -> list[str]:
    """The training step at the largest batch that fits, PyTorch's eager one before the compiled one.

    Where the kernel was seen to fail, XLA's scan searches instead, and the row says so.
    """
    command = ["benchmarks/train_step.py", "--alone", "--methods=fvq_jax,torch_eager,torch"]
    if args.tiny:
        fields = [f"--config.{name}={value}" for name, value in TINY_STEP.items()]
        return [*command, f"--config=configs/{config}.py:smoke", *fields, "--batch=2", "--rounds=2"]
    sized = [f"--batch={args.batch or batch_for(rows)}", "--rounds=7", "--budget=15"]
    if not kernel_works(rows):
        sized.append("--config.tokenizer.quantizer.search_implementation=xla")
    return [*command, f"--config=configs/{config}.py", *sized]


def kernel_works(rows: list[dict[str, Any]]) -> bool:
    """Whether the kernel that the step uses finds the nearest codes in the searches so far; True if none was made."""
    searches = [row for row in rows if row["part"].startswith("search") and "ended" not in row]
    ours = [row.get("agreement", 0) for row in searches if row["method"] == "fvq_jax:highest"]
    return not searches or (bool(ours) and min(ours) > 0.99)


def batch_for(rows: list[dict[str, Any]]) -> int:
    """The batch to begin with: a power of two by the memory of the chip, which is halved while it does not fit."""
    memory = next((row["memory_gib"] for row in rows if "memory_gib" in row), 60)
    return next(batch for least, batch in BATCHES if memory >= least)


def generator_step(args: argparse.Namespace) -> list[str]:
    """The training step of the 343 M parameter generator."""
    return [
        "benchmarks/generator_step.py",
        "--alone",
        "--budget=10",
        *generator(args),
        f"--batch={2 if args.tiny else 32}",
    ]


def sampling(args: argparse.Namespace, methods: str) -> list[str]:
    """Sampling from the same generator."""
    batches = "1,2" if args.tiny else "1,8,64"
    sizes = [*generator(args), f"--batches={batches}", "--rounds=2", "--budget=10"]
    return ["benchmarks/sampling.py", f"--methods={methods}", *sizes]


def generator(args: argparse.Namespace) -> list[str]:
    """The generator's sizes; the precision is said here, so that only the measured processes use the chip."""
    if args.tiny:
        return ["--size=tiny", "--vocab=64", "--classes=5", "--grid=4", "--rounds=2", "--dtype=float32"]
    return ["--size=L", "--rounds=5", "--dtype=bfloat16"]


def training(args: argparse.Namespace, out: Path, rows: list[dict[str, Any]], seconds: float) -> list[str]:
    """A run of fvq16k's network at 128 pixels for the time that is left."""
    command = ["benchmarks/short_training.py", f"--seconds={seconds - 5}", f"--plot={out}/training.png"]
    if args.train:
        command += [f"--train={args.train}", f"--val={args.val}"]
    if not kernel_works(rows):
        command.append("--search=xla")
    if args.tiny:
        tiny = ["--size=32", "--batch=4", "--images=8", "--evaluations=2", "--expect=2", "--start=35"]
        return [*command, "--config=configs/fvq16k.py:smoke", *tiny]
    ours = (row for row in rows if row["part"] == "step_fvq16k" and row.get("method") == "fvq_jax")
    if rate := next((row["images_per_second"] for row in ours if "images_per_second" in row), None):
        # A quarter of the pixels, and no LPIPS; but reading pictures may take as long.
        command.append(f"--expect={2.5 * rate:.0f}")
    return command
