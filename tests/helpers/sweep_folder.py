"""The workdir of a sweep that still runs, as a sweep and its runs leave it."""

import json
import pathlib

from fvq_jax.sweep.points import Point, make_points, write_record
from fvq_jax.training.metric_files import METRICS_FILE
from tests.helpers.tiny import tiny_config

EVALUATION = {"eval/usage": 0.25, "eval/psnr": 21.0, "eval/perplexity": 12.0, "eval/tokens": 640}


def write_point(point: Point, status: str, lines=(), **outcome) -> None:
    """A point's workdir with its record and what its run has logged."""
    point.workdir.mkdir(parents=True)
    write_record(point, status, **outcome)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (point.workdir / METRICS_FILE).write_text(text)


def write_sweep(folder: pathlib.Path) -> None:
    """A sweep over two fields that still runs: one point of each kind."""
    sweep = [
        {"tokenizer.quantizer.codebook_size": codes, "tokenizer.quantizer.bridge": bridge}
        for codes in (64, 256)
        for bridge in ("none", "XS/2")
    ]
    done, running, failed, waiting = make_points(tiny_config(), sweep, folder)
    lines = [{"step": 2, "loss/total": 1.0, "images_per_second": 5.0, "memory/peak_bytes": 3 * 1024**3}]
    lines += [{"step": 2, **EVALUATION}, {"step": 4, "images_per_second": 7.0, "memory/peak_bytes": 2**30}]
    better = {"step": 4, **EVALUATION, "eval/psnr": 22.5}
    summary = {"step": 4, "usage": 0.25, "psnr": 22.5, "parameters": 1234, "seconds": 60.5, "images_per_second": 6.5}
    write_point(done, "finished", [*lines, better], exit_code=0, summary=summary)
    write_point(running, "running", lines)
    with (running.workdir / METRICS_FILE).open("a") as file:
        file.write('{"step": 4, "eval/psn')
    write_point(failed, "failed", exit_code=1, error="step 3: loss/total is nan | inf")
    write_point(waiting, "waiting")
