"""Time and memory of a whole training step beside the same step in PyTorch: same network, weights, batch, machine.

  python benchmarks/train_step.py --config=configs/fvq16k.py --markdown    # on a GPU; on a CPU for instance with
      --batch=8 --config.tokenizer.ch=32 --config.data.image_size=128

A step is encoder, bridge, search, decoder, LPIPS (random weights of the true shapes), discriminator and both updates,
on one chip or on the whole CPU, and every field of the config can be overridden. A CPU computes in float32.

On a GPU or TPU the programs run one after the other, each alone with its memory, and each at half the batch, and half
of that, as long as it does not fit (--alone); elsewhere they alternate. PyTorch's step is compiled on a GPU;
`torch_eager` is the same step uncompiled.

`mfu` is the share of the device's peak (`fvq_jax/runtime/chips.py`) that the products of the step reach, as they are
written in our step (`runtime/products.py`), for all programs. `peak_mib` of ours on a GPU includes what compiling and
the choice of algorithms took; `program_mib` is what XLA planned for the step.

`quantizer_share` is the time of a second compiled function, the quantizer alone (bridge, search, look-up, losses and
their gradients, on random latents; not its share of the update), over the time of the step in the same round. The
script ends with an error if both networks differ in their parameter counts or in the losses of their first step.
"""

import copy
import statistics
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from absl import flags
from ml_collections import ConfigDict, config_flags

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import jax_step
from benchmarks.processes import DoesNotFitError, Worker, alternate, machine, median_ratio, write_rows
from fvq_jax.config.checks import validate
from fvq_jax.models.frozen.lpips import STAGES, WIDTHS
from fvq_jax.runtime.allocation import has_accelerator
from fvq_jax.runtime.errors import InputError
from fvq_jax.tasks import task_of

FLAGS = flags.FlagValues()  # not absl's own: the program fvq_jax.main has flags of the same names
own = {"flag_values": FLAGS}
config_flags.DEFINE_config_file("config", **own)
flags.DEFINE_integer("batch", 0, "images per step; 0: the config's batch", **own)
flags.DEFINE_list("methods", ["fvq_jax", "torch"], "which to run, of fvq_jax, torch, torch_eager", **own)
flags.DEFINE_bool("alone", has_accelerator(), "one program after the other, at the largest batch that fits", **own)
flags.DEFINE_integer("rounds", 7, "timed rounds", **own)
flags.DEFINE_float("budget", 240, "seconds for them; at least two rounds are run", **own)
flags.DEFINE_bool("help", False, "this text", **own)
flags.DEFINE_bool("markdown", False, "a table after the rows", **own)
METHODS = ("fvq_jax", "torch", "torch_eager")
COLUMNS = {
    "method": "method",
    "codes": "codes",
    "search": "search",
    "batch": "batch",
    "seconds": "seconds per step",
    "images_per_second": "images / s",
    "ours_over_this": "ours / this",
    "mfu": "MFU",
    "quantizer_share": "quantizer and bridge",
    "peak_mib": "peak MiB",
    "program_mib": "planned MiB",
    "status": "",
}


def load_torch(config: ConfigDict, folder: str, compiled: bool) -> Any:
    """The PyTorch step."""
    from benchmarks import torch_step

    return torch_step.load(config, folder, *jax_step.inputs(config), compiled)


def write_lpips(path: Path) -> None:
    """Random weights of LPIPS in its published layout: the time of a step does not depend on them."""
    rng, tensors, before = np.random.default_rng(0), {}, 3
    for stage, (width, indices) in enumerate(zip(WIDTHS, STAGES, strict=True)):
        for index in indices:
            name, deviation = f"net.slice{stage + 1}.{index}", (2 / (9 * before)) ** 0.5
            tensors[f"{name}.weight"] = deviation * rng.standard_normal((width, before, 3, 3), np.float32)
            tensors[f"{name}.bias"] = np.zeros(width, np.float32)
            before = width
        tensors[f"lin{stage}.model.1.weight"] = rng.uniform(0, 1 / width, (1, width, 1, 1)).astype(np.float32)
    safetensors.numpy.save_file(tensors, path)


def with_batch(config: ConfigDict, batch: int) -> ConfigDict:
    """A copy with another batch."""
    config = copy.deepcopy(config)
    config.batch_size = batch
    return config


def compare(
    config: ConfigDict, folder: str, methods: list[str], rounds: int, budget: float, alone: bool = False
) -> Iterator[dict]:
    """One row per method, the first being the one the others are compared with: the methods alternate.

    With `alone`, one runs after the other at the largest batch that fits, and each row comes as soon as it is known. A
    row whose network is not that of the first row says so in its `status`.
    """
    first: Step | None = None
    for group in [[method] for method in methods] if alone else [methods]:
        steps = [Step(method, config, folder, halve=alone) for method in group]
        seconds = alternate({s.method: s.worker for s in steps if s.worker}, ["step", "quantizer"], rounds, budget)
        for step in steps:
            if step.worker:
                mine = {run: seconds[step.method, run] for run in ("step", "quantizer")}
                first = step.measured(mine, first or (step if step.method == methods[0] else None))
            yield step.row


class Step:
    """A step of one method in a process of its own, and its row; `worker` is None if it could not be started.

    With `halve` the batch is halved while it does not fit, and a program that fails is a row too.
    """

    def __init__(self, method: str, config: ConfigDict, folder: str, halve: bool):
        self.method, self.worker, self.seconds = method, None, {}
        quantizer = config.tokenizer.quantizer
        self.row = {"method": method, "status": "", "codes": quantizer.codebook_size, "dim": quantizer.code_dim}
        self.row |= {"batch": config.batch_size, "image_size": config.data.image_size, **machine()}
        if method == "fvq_jax":
            self.row["search"] = f"{quantizer.search_precision}, {quantizer.search_implementation}"
        if method != "fvq_jax" and find_spec("torch") is None:
            self.row["status"] = "torch is not installed"
            return
        while self.worker is None:
            sized = with_batch(config, self.row["batch"])
            try:
                if method == "fvq_jax":
                    self.worker = Worker("jax", jax_step.load, sized, folder)
                else:
                    self.worker = Worker("torch", load_torch, sized, folder, method == "torch")
            except DoesNotFitError as error:
                if not halve or self.row["batch"] == 1:
                    self.row["status"] = str(error)
                    return
                self.row["batch"] //= 2
            except RuntimeError as error:
                if not halve:
                    raise
                self.row["status"] = f"failed: {error}"
                return

    def measured(self, seconds: dict[str, list[float]], first: "Step | None") -> "Step | None":
        """Completes the row from the seconds of every run, beside those of the first method; ends the process."""
        row, worker, self.seconds = self.row, self.worker, seconds
        for name in ("device", "parameters", "losses", *(["counted"] if self.method == "fvq_jax" else [])):
            row[name] = worker.run(name).answer
        row |= row.pop("counted", {})
        row["seconds"] = round(statistics.median(seconds["step"]), 4)
        row["images_per_second"] = round(row["batch"] / row["seconds"], 2)
        row["quantizer_share"] = round(median_ratio(seconds["quantizer"], seconds["step"]), 3)
        row["held_mib"], row["peak_mib"] = round(worker.held), round(worker.peak())
        worker.close()
        if first is not None:
            per_image = median_ratio(first.seconds["step"], seconds["step"]) * row["batch"] / first.row["batch"]
            row["ours_over_this"] = round(per_image, 3)
            row["status"] = _difference(first.row, row)
            if "flops" in first.row:
                rate = first.row["flops"] / first.row["batch"] * row["images_per_second"]
                row["mfu"] = round(rate / first.row["peak_flops"], 4)
        return first


def _difference(ours: dict, other: dict) -> str:
    """Empty if parameter counts agree, and the losses of the first step nearly; else what differs."""
    if ours["parameters"] != other["parameters"]:
        return f"another network: {ours['parameters']} and {other['parameters']} parameters"
    tolerance = 1e-3 if ours["device"] == "cpu" else 5e-2  # float32, bfloat16
    for name, mine in ours["losses"].items() if ours["batch"] == other["batch"] else ():
        theirs = other["losses"][name]
        if abs(mine - theirs) > tolerance * abs(mine):
            return f"another network: the {name} loss of the first step is {mine} and {theirs}"
    return ""


def main() -> None:
    """Reads config and options and writes the rows."""
    try:
        unknown = [*FLAGS(sys.argv)[1:], *(set(FLAGS.methods) - set(METHODS))]
    except (flags.Error, InputError, AttributeError, KeyError) as error:
        sys.exit(f"{error} (see --help)")
    if unknown:
        sys.exit(f"unknown argument or method {unknown[0]!r}: options start with --, methods are {', '.join(METHODS)}")
    if FLAGS.help or FLAGS.config is None:
        sys.exit(f"{__doc__}\n{FLAGS.get_help()}")
    with tempfile.TemporaryDirectory() as folder:
        write_lpips(Path(folder) / "lpips.safetensors")
        config = FLAGS.config
        config.adversarial.start = 1
        config.loss.lpips_path = f"{folder}/lpips.safetensors"
        config.data.source, config.eval.crops = "photos", 0  # no picture is read
        try:
            validate(config, task_of(config), devices=1)
        except InputError as error:
            sys.exit(str(error))
        config = with_batch(config, FLAGS.batch or config.batch_size)
        steps = compare(config, folder, FLAGS.methods, FLAGS.rounds, FLAGS.budget, FLAGS.alone)
        rows = write_rows(steps, COLUMNS, FLAGS.markdown)
    if different := [row["status"] for row in rows if row["status"].startswith("another network")]:
        sys.exit(different[0])


if __name__ == "__main__":
    main()
