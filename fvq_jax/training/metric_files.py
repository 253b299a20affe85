"""The metrics of a run on disk: `metrics.jsonl` and TensorBoard files. Only the first process writes.

What is measured is left to the loop and the task.
"""

import errno
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int, UInt8

from fvq_jax.runtime.files import replace_whole

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
    """Scalars, images and histograms to `workdir/tensorboard`; scalars to `workdir/metrics.jsonl` too.

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
        with replace_whole(workdir / METRICS_FILE) as unfinished:
            unfinished.write_text("".join(_json_line(row) for row in kept))
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

    def histogram(self, step: int, name: str, counts: Int[np.ndarray | jax.Array, "..."]) -> None:
        """Hits over code index to TensorBoard; beyond 512 codes, neighbours share a bucket."""
        if self._tensorboard is None:
            return
        counts = np.asarray(counts, dtype=np.float64).reshape(-1)
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
