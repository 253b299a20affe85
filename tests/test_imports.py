"""The imports that must never exist: what keeps the rooms of docs/design.md apart."""

import json
import subprocess
import sys

import pytest

from tests.helpers.import_graph import ROOT, circle, import_graph, sources

ROOMS = sorted(path.name for path in (ROOT / "fvq_jax").iterdir() if (path / "__init__.py").exists())
COMMANDS = ("__main__", "main", "evaluate", "sample", "tokenize", "convert", "plan", "sweep", "data.prepare")
# room: rooms that it must not import.
NEVER = {
    "training": {"tasks", "models", "evals", "report"},
    "evals": {"tasks", "report"},
    "report": {"tasks", "models"},
    "models": {"interop", "config", "data", "tasks", "training", "evals", "report", "inference"},
    "config": {"models", "evals", "training", "tasks", "data"},
    "inference": {"tasks", "config", "data", "evals", "report"},
    "interop": {"tasks", "config", "data", "training", "evals", "report", "inference"},
    "data": {"tasks", "models", "training", "evals", "report", "inference", "interop"},
    "runtime": set(ROOMS) - {"runtime"},
    "ops": set(ROOMS) - {"ops"},
}


def part(name):
    """The room of a module, or the command that it is, without `fvq_jax.`."""
    inner = name.removeprefix("fvq_jax.")
    return inner if inner in COMMANDS else inner.partition(".")[0]


def forbidden(modules):
    """ "importer -> imported" of every import that must not exist."""
    found = []
    for name, others in import_graph(modules).items():
        for other in others:
            here, there = part(name), part(other)
            tasks = [module.split(".")[2] for module in (name, other) if module.startswith("fvq_jax.tasks.")]
            if (
                there in NEVER.get(here, ())
                or (there in COMMANDS and here != there)
                or (len(tasks) == 2 and tasks[0] != tasks[1])
            ):
                found.append(f"{name} -> {other}")
    return found


@pytest.fixture(scope="module")
def package():
    return sources("fvq_jax")


def test_a_file_at_the_top_is_a_command_and_a_folder_is_a_room():
    files = {path.stem for path in (ROOT / "fvq_jax").glob("*.py")}
    assert files == {"__init__", "__main__", "main", "sample", "tokenize", "convert", "plan"}
    assert set(ROOMS) - set(COMMANDS) == {*NEVER, "tasks"}


def test_no_import_that_must_not_exist(package):
    assert forbidden(package) == []


@pytest.mark.parametrize(
    ("importer", "line"),
    [
        ("fvq_jax.training.loop", "from fvq_jax.tasks.tokenizer.task import TokenizerTask"),
        ("fvq_jax.training.loop", "import fvq_jax.models.tokenizer"),
        ("fvq_jax.training.step_plan", "def f():\n    from fvq_jax.report import page"),
        ("fvq_jax.evals.frechet", "from fvq_jax.tasks import TASKS"),
        ("fvq_jax.report.page", "from fvq_jax.models import tokenizer"),
        ("fvq_jax.models.frozen.lpips", "from fvq_jax.interop.torch_file import read_tensors"),
        ("fvq_jax.config.checks", "from fvq_jax.training.task import Task"),
        ("fvq_jax.inference.saved", "from fvq_jax.config.fields import SHARED"),
        ("fvq_jax.ops.nearest", "from fvq_jax.runtime.names import dotted"),
        ("fvq_jax.runtime.exits", "from fvq_jax.ops.pixels import to_float"),
        ("fvq_jax.data.sources", "from fvq_jax.data.prepare import prepare"),
        ("fvq_jax.plan", "from fvq_jax.main import main"),
    ],
)
def test_the_test_above_sees_a_new_one(package, importer, line):
    (found,) = forbidden({**package, importer: f"{package[importer]}\n{line}\n"})
    assert found.startswith(f"{importer} -> ")


def test_one_task_must_not_import_another(package):
    other = {"fvq_jax.tasks.other.task": "from fvq_jax.tasks.tokenizer.losses import Losses"}
    assert forbidden({**package, **other}) == ["fvq_jax.tasks.other.task -> fvq_jax.tasks.tokenizer.losses"]


@pytest.mark.parametrize("folders", [("fvq_jax",), ("benchmarks", "configs"), ("tests",)])
def test_no_circle_of_imports(folders):
    assert circle(import_graph(sources(*folders))) == []


def test_a_circle_is_found():
    modules = {"a": "import b", "b": "def f():\n    from c import d", "c": "import a\nimport e", "e": ""}
    assert circle(import_graph(modules)) == ["a", "b", "c"]


def imported_by(line):
    """The modules that are loaded after this line, in a process of its own."""
    program = f"{line}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(json.loads(found.stdout.splitlines()[-1]))


def test_the_package_itself_imports_nothing():
    assert not {"jax", "numpy", "flax"} & imported_by("import fvq_jax")


def test_the_public_tokenizer_brings_in_neither_trainer_nor_data_nor_checkpoints():
    modules = imported_by("from fvq_jax import Tokenizer")
    assert "fvq_jax.inference.tokenizer" in modules
    own = {name for name in modules if name.startswith("fvq_jax.")}
    assert not [name for name in own if part(name) in ("training", "tasks", "data", "config", "evals", "report")]
    libraries = {"grain", "tensorflow_datasets", "optax", "orbax", "clu", "ml_collections", "matplotlib", "torch"}
    assert not libraries & modules
