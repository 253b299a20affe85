"""What the training loop logs with: metric files, progress, step times. Only process 0 writes.

`MetricWriter` keeps TensorBoard files and `metrics.jsonl`, `Progress` tells a person how far the run is,
`StepTimer` splits the wall time. None of them touches standard output, whose last line is the run's result.
What is measured is left to the loop, `ops` and `evals`; what the hardware could do to `fvq_jax.device`; the
page about a finished run to `fvq_jax.report`.
"""

import contextlib
import errno
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from jaxtyping import Int, UInt8
from tqdm import tqdm

METRICS_FILE = "metrics.jsonl"
_HISTOGRAM_BUCKETS = 512


def read_metrics(workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows `{"step": int, name: float | None, ...}` of `workdir/metrics.jsonl`; [] without the file.

    A last line cut short (the process died while writing it) is left out.
    """
    path = Path(workdir) / METRICS_FILE
    if not path.exists():
        return []
    lines = path.read_text().split("\n")  # what follows the last newline is empty, or a line cut short
    return [json.loads(line) for line in lines[:-1]]


class MetricWriter:
    """Scalars, images and code histograms to `workdir/tensorboard`; scalars to `workdir/metrics.jsonl` too.

    `start_step` is the number of steps the restored checkpoint has behind it. What an earlier process logged
    beyond it will be logged again, so those lines are dropped (the file is replaced atomically) and
    TensorBoard is told to hide them: a curve never doubles back. A run that starts at 0 starts afresh. With
    `active=False` (every process but the first) nothing is touched.
    """

    def __init__(self, workdir: str | os.PathLike[str], *, start_step: int, active: bool):
        self._tensorboard = None
        if not active:
            return
        # Imported here, since it brings in PyTorch where that is installed, which takes seconds.
        from tensorboardX import SummaryWriter

        workdir = Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        kept = [row for row in read_metrics(workdir) if start_step > 0 and row["step"] <= start_step]
        unfinished = workdir / f"{METRICS_FILE}.tmp"
        unfinished.write_text("".join(_json_line(row) for row in kept))
        unfinished.replace(workdir / METRICS_FILE)
        self._lines = (workdir / METRICS_FILE).open("a")
        self._tensorboard = SummaryWriter(
            str(workdir / "tensorboard"),
            purge_step=start_step + 1 if start_step else 0,
            # A name is made of the second it was opened in: a quick restart must not overwrite the file.
            filename_suffix=f".from{start_step}",
            flush_secs=20,
        )

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """One line of `metrics.jsonl` (non-finite values as null) and one TensorBoard point per name."""
        if self._tensorboard is None:
            return
        if not self._tensorboard.file_writer.event_writer._worker.is_alive():
            # It ends at the first error, and whatever is added after that waits for ever.
            raise OSError(errno.EIO, "TensorBoard's files could not be written")
        row = {name: float(value) for name, value in values.items()}
        self._lines.write(_json_line({"step": int(step), **row}))
        self._lines.flush()
        for name, value in row.items():
            self._tensorboard.add_scalar(name, value, step)

    def image(self, step: int, name: str, image: UInt8[np.ndarray, "H W c"]) -> None:
        """A picture to TensorBoard; c is 1, 3 or 4."""
        if self._tensorboard is not None:
            self._tensorboard.add_image(name, image, step, dataformats="HWC")

    def histogram(self, step: int, name: str, counts: Int[np.ndarray | jax.Array, "k"]) -> None:
        """Hits over code index to TensorBoard; beyond 512 codes, neighbours share a bucket."""
        if self._tensorboard is None:
            return
        counts = np.asarray(counts, dtype=np.float64)
        starts = np.unique(np.linspace(0, counts.size, _HISTOGRAM_BUCKETS, endpoint=False, dtype=np.int64))
        hit = np.flatnonzero(counts)
        index = np.arange(counts.size, dtype=np.float64)
        self._tensorboard.add_histogram_raw(
            name,
            min=float(hit[0]) if hit.size else 0.0,
            max=float(hit[-1]) if hit.size else 0.0,
            num=float(counts.sum()),
            sum=float(counts @ index),
            sum_squares=float(counts @ index**2),
            bucket_limits=np.append(starts[1:], counts.size).astype(np.float64).tolist(),
            bucket_counts=np.add.reduceat(counts, starts).tolist(),
            global_step=step,
        )

    def flush(self) -> None:
        """Hand what was logged to the disk. TensorBoard's own thread may lag a moment; `close` waits for it."""
        if self._tensorboard is not None:
            self._lines.flush()
            self._tensorboard.flush()

    def close(self) -> None:
        """Flush and end; a second call does nothing."""
        if self._tensorboard is not None:
            self.flush()
            self._lines.close()
            self._tensorboard.close()
            self._tensorboard = None


def _json_line(row: Mapping[str, Any]) -> str:
    strict = {name: value if value is not None and math.isfinite(value) else None for name, value in row.items()}
    return json.dumps(strict, allow_nan=False) + "\n"


class Progress:
    """How far the run is, on standard error: a bar if that is a terminal, else a log line per logged step.

    The bar may advance at every step; figures are given only when the loop has them on the host anyway, since
    asking the device for them would stall it.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int,
        *,
        active: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._total = total_steps
        self._active = active
        self._clock = clock
        self._origin = (start_step, clock())
        self._compiled = False
        self._bar: tqdm | None = None
        if active and sys.stderr.isatty():
            self._bar = tqdm(total=total_steps, initial=start_step, unit="step", dynamic_ncols=True, file=sys.stderr)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def update(
        self,
        step: int,
        *,
        loss: float | None = None,
        usage: float | None = None,
        images_per_second: float | None = None,
    ) -> None:
        """`step` steps are done. Without a terminal a line is written only if a figure is given."""
        if not self._active:
            return
        figures = {
            "loss": None if loss is None else f"{loss:.4f}",
            "usage": None if usage is None else f"{usage:.1%}",
            "images/s": None if images_per_second is None else f"{images_per_second:.1f}",
        }
        figures = {name: text for name, text in figures.items() if text is not None}
        if self._bar is not None:
            if figures:
                self._bar.set_postfix(figures, refresh=False)
            self._bar.update(step - self._bar.n)
        elif figures:
            words = [f"{name} {text}" for name, text in figures.items()]
            logging.info("%s", ", ".join([f"step {step}/{self._total}", *words, f"ETA {self._eta(step)}"]))
            if not self._compiled:  # the first line's time is mostly compilation and says nothing about the rest
                self._origin, self._compiled = (step, self._clock()), True

    def _eta(self, step: int) -> str:
        origin_step, origin_time = self._origin
        if step <= origin_step:
            return "?"
        return tqdm.format_interval((self._total - step) * (self._clock() - origin_time) / (step - origin_step))

    def close(self) -> None:
        """Leave the bar as it stands and end its line."""
        if self._bar is not None:
            self._bar.close()


class StepTimes(NamedTuple):
    """What a window of steps took: `data` and `compute` in seconds per step, and the rate over both."""

    steps: int
    data: float
    compute: float
    images_per_second: float


class StepTimer:
    """Splits the wall time of the loop into waiting for data and everything else (compute), pauses left out.

    Steps are dispatched asynchronously, so a single step cannot be timed from the host; a window of them can,
    if its end waits for the device: call `read` (and enter `paused`) after the metrics of the last step have
    arrived on the host. A loop whose next batch is not there yet should wait for its step before it enters
    `data`, which then is the time in which the devices stood still for their input. Time spent inside `paused`
    (evaluation, checkpoints) counts nowhere.
    """

    def __init__(self, batch_size: int, *, clock: Callable[[], float] = time.perf_counter):
        self._batch_size = batch_size
        self._clock = clock
        self._reset()

    def _reset(self) -> None:
        self._start, self._steps, self._waited, self._paused = self._clock(), 0, 0.0, 0.0

    @contextlib.contextmanager
    def data(self) -> Iterator[None]:
        """Around fetching the next batch."""
        start = self._clock()
        yield
        self._waited += self._clock() - start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is not training: evaluation, checkpoints, reports."""
        start = self._clock()
        yield
        self._paused += self._clock() - start

    def step(self) -> None:
        """One step (of `batch_size` images over all devices) was dispatched."""
        self._steps += 1

    def read(self) -> StepTimes:
        """The times since the last `read` (zeros if no step was made), and the start of a new window."""
        training = self._clock() - self._start - self._paused
        steps, waited = self._steps, self._waited
        self._reset()
        if steps == 0 or training <= 0.0:
            return StepTimes(steps, 0.0, 0.0, 0.0)
        return StepTimes(steps, waited / steps, (training - waited) / steps, steps * self._batch_size / training)
