"""The metrics of a run on disk: `metrics.jsonl` and TensorBoard files. Only the first process writes.

What is measured is left to the loop and the task.
"""

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int, UInt8

from fvq_jax.runtime.errors import InputError
from fvq_jax.runtime.files import json_text, replace_whole

METRICS_FILE, TENSORBOARD = "metrics.jsonl", "tensorboard"
_HISTOGRAM_BUCKETS = 512


def read_metrics(workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads the rows `{"step": int, name: float | None, ...}` of `workdir/metrics.jsonl`; [] without the file.

    A last line cut short (the process died while writing it) is left out. InputError for any other damage.
    """
    path = Path(workdir) / METRICS_FILE
    if not path.exists():
        return []
    try:
        lines = path.read_text().split("\n")  # what follows the last newline is empty, or a line cut short
        rows = [json.loads(line) for line in lines[:-1]]
        if not all(isinstance(row, dict) and isinstance(row.get("step"), int) for row in rows):
            raise ValueError("a line has no step")
    except ValueError as error:
        raise InputError(f"{path} is damaged: {error}; move it away to go on without the curves so far") from error
    return rows


class MetricWriter:
    """Writes scalars, images and histograms to `workdir/tensorboard`, and scalars also to `workdir/metrics.jsonl`.

    `start_step` is the step of the restored checkpoint. Later steps that an earlier process has logged will be logged
    again. So their lines are dropped (the file is replaced atomically) and TensorBoard is told to hide them: no curve
    has two values at one step. A run that starts at step 0 drops all lines. With `active=False` (every process but the
    first) nothing is written.
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
            unfinished.write_text("".join(json_text(row) + "\n" for row in kept))
        self._lines = (workdir / METRICS_FILE).open("a")
        self._tensorboard = SummaryWriter(
            str(workdir / TENSORBOARD),
            purge_step=start_step + 1 if start_step else 0,
            # A file is named after the second in which it is opened; the suffix protects it from a quick restart.
            filename_suffix=f".from{start_step}",
            flush_secs=20,
            # Without a limit: if the disk fails and TensorBoard's thread dies, adding to a full queue waits for ever.
            max_queue=0,
        )
        # Nor may the end of the program wait for what that thread will never take.
        self._tensorboard.file_writer.event_writer._event_queue.cancel_join_thread()

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes one line of `metrics.jsonl` (non-finite values as null) and one TensorBoard point per name."""
        if self._tensorboard is None:
            return
        if not self._tensorboard.file_writer.event_writer._worker.is_alive():
            # TensorBoard's thread ends at its first error; adding anything after that would wait for ever.
            raise OSError(errno.EIO, "TensorBoard's files could not be written")
        row = {name: float(value) for name, value in values.items()}
        self._lines.write(json_text({"step": int(step), **row}) + "\n")
        self._lines.flush()
        for name, value in row.items():
            self._tensorboard.add_scalar(name, value, step)

    def image(self, step: int, name: str, image: UInt8[np.ndarray, "H W c"]) -> None:
        """Writes a picture to TensorBoard; c is 1, 3 or 4."""
        if self._tensorboard is not None:
            self._tensorboard.add_image(name, image, step, dataformats="HWC")

    def histogram(self, step: int, name: str, counts: Int[np.ndarray | jax.Array, "..."]) -> None:
        """Writes to TensorBoard how often each code was hit, by index; above 512 codes, neighbours share a bucket."""
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
        """Writes what was logged to disk. TensorBoard's own thread may lag a moment; `close` waits for it."""
        if self._tensorboard is not None:
            self._lines.flush()
            self._tensorboard.flush()

    def close(self) -> None:
        """Flushes and closes the files; a second call does nothing."""
        if self._tensorboard is not None:
            self.flush()
            self._lines.close()
            self._tensorboard.close()
            self._tensorboard = None
