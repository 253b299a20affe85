"""Everything that only a GPU or TPU can show, in a given time, the most important first.

  python benchmarks/accelerator.py --out=DIR [--budget=480] [--parts=search_262144,step_fvq16k] [--train=DIR --val=DIR]

Each part is one of the other benchmarks with fixed sizes, in a process of its own that is ended, with all that it
started, when the part's time is over: what hangs, crashes or compiles for minutes costs no other part. Parts run one
after the other while the budget lasts. `--tiny` makes every size tiny, to try all of it on a CPU.

DIR gets `results.jsonl`, to which every row is added as soon as it is known, with `part` and, at the end of a part, a
row with `ended` (done, or why not) and its seconds; `table.md`, the same as tables for docs/results.md, with a heading
for each part; `accelerator.log`, the last lines of what each part wrote to standard error; and `training.png`. A second
call with the same DIR adds to them.
"""

import argparse
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.accelerator_parts import COLUMNS_OF, LEAST, Part, parts
from benchmarks.processes import markdown_table

ROOT = Path(__file__).parents[1]
RESULTS, TABLE, LOG = "results.jsonl", "table.md", "accelerator.log"
LOG_LINES = 80  # of each part


def run_part(part: Part, seconds: float, environment: dict[str, str], found: Callable[[dict], None], log: IO) -> str:
    """Runs the command of a part; hands every row to `found`. Returns "done", or why it ended otherwise."""
    process = subprocess.Popen(
        [sys.executable, *part.command(seconds)],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        errors="replace",
        start_new_session=True,  # so that all its processes can be ended together
    )

    def read() -> None:
        with process.stdout as lines:
            for line in lines:
                with contextlib.suppress(ValueError):
                    if line.startswith("{"):
                        found(json.loads(line))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        code = process.wait(seconds)
        reader.join(5)
    except subprocess.TimeoutExpired:
        return f"stopped after {seconds:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        reader.join(5)
    return "done" if code == 0 else f"failed with exit code {code}"


def last_lines(path: Path, count: int) -> list[str]:
    """The last lines of a text file."""
    return path.read_text(errors="replace").splitlines()[-count:]


def run(args: argparse.Namespace, out: Path, scratch: Path) -> None:
    """Runs the parts while the budget lasts."""
    began, rows = time.monotonic(), read_rows(out)
    caches = {  # programs that several parts compile
        "JAX_COMPILATION_CACHE_DIR": str(scratch / "jax"),
        "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
        "TRITON_CACHE_DIR": str(scratch / "triton"),
    }
    paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment = caches | os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    with (out / RESULTS).open("a") as results:
        lock = threading.Lock()

        def write(part: str, row: dict[str, Any]) -> None:
            with lock:
                rows.append({"part": part, **row})
                results.write(json.dumps(rows[-1]) + "\n")
                results.flush()
                sys.stdout.write(json.dumps(rows[-1]) + "\n")
                sys.stdout.flush()

        def end(part: str, why: str, seconds: float) -> None:
            write(part, {"ended": why, "seconds": seconds})
            (out / TABLE).write_text(tables(rows))

        for part in parts(args, out, rows):
            left, started = args.budget - (time.monotonic() - began), time.monotonic()
            if left < min(LEAST, part.limit):
                end(part.name, f"not started: {max(0, left):.0f} s were left", 0)
                continue
            errors = scratch / "stderr"
            why = "interrupted"
            try:
                with errors.open("w") as log:
                    why = run_part(part, min(left, part.limit), environment, lambda r, p=part: write(p.name, r), log)
            except OSError as error:
                why = f"failed to start: {error}"
            finally:
                lines = last_lines(errors, LOG_LINES)
                with (out / LOG).open("a") as log:
                    log.write("\n".join([f"== {part.name}: {why}", *lines, ""]))
                if why.startswith("failed") and lines:
                    why += f": {lines[-1][:300]}"
                end(part.name, why, round(time.monotonic() - started, 1))


def read_rows(out: Path) -> list[dict[str, Any]]:
    """The rows of earlier calls."""
    path = out / RESULTS
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def tables(rows: list[dict[str, Any]]) -> str:
    """All rows in Markdown, a heading and a table for each part."""
    text = []
    for name in dict.fromkeys(row["part"] for row in rows):
        mine = [row for row in rows if row["part"] == name]
        kind = next(kind for kind in COLUMNS_OF if name.startswith(kind))
        columns = importlib.import_module(f"benchmarks.{COLUMNS_OF[kind]}").COLUMNS
        found = [row for row in mine if "ended" not in row]
        used = {key: head for key, head in columns.items() if any(row.get(key) not in (None, "") for row in found)}
        ended = "; ".join(f"{row['ended']} ({row['seconds']} s)" for row in mine if "ended" in row)
        text.append(f"## {name}\n\n{markdown_table(found, used) if used else ''}\n{ended}\n")
    return "\n".join(text)


def main(argv: list[str] | None = None) -> None:
    """Reads the options and runs the parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder for the results")
    parser.add_argument("--budget", type=float, default=480, help="seconds for everything (default: %(default)s)")
    parser.add_argument("--parts", help="which, separated by commas, in this order (default: all of them)")
    parser.add_argument("--batch", type=int, help="images of a training step (default: by the memory of the chip)")
    parser.add_argument("--train", help="folder of pictures for the training run (default: bundled photographs)")
    parser.add_argument("--val", help="folder of pictures for its evaluations")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to try everything on a CPU")
    parser.add_argument("--markdown", action="store_true", help="the tables on standard output too, at the end")
    args = parser.parse_args(argv)
    if bool(args.train) != bool(args.val):
        parser.error("--train and --val are needed together")
    out = Path(args.out).absolute()
    out.mkdir(parents=True, exist_ok=True)
    for name in ("train", "val"):
        if getattr(args, name):
            setattr(args, name, str(Path(getattr(args, name)).absolute()))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that the part's processes end too
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        try:
            run(args, out, Path(scratch))
        except ValueError as error:
            parser.error(str(error))
    if args.markdown:
        sys.stdout.write("\n" + (out / TABLE).read_text())


if __name__ == "__main__":
    main()
