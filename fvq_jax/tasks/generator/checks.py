"""Refuses a generator's config that cannot run, in one line that says what would work."""

from ml_collections import ConfigDict

from fvq_jax.config.checks import near
from fvq_jax.runtime.errors import require
from fvq_jax.runtime.mesh import mesh_shape
from fvq_jax.tasks.generator.fields import hidden

_HEAD_UNIT = 4  # channels of a head come in pairs, one half of which rotates by the row and the other by the column


def check(config: ConfigDict, devices: int) -> None:
    """Raises InputError for what the types and ranges of single fields cannot show."""
    _check_network(config)
    _check_unroll(config)
    _check_layout(config, devices)
    _check_samples(config)
    for name in ("train_dir", "eval_dir"):
        require(
            bool(config.data[name]),
            f"data.{name} is empty: set --config.data.{name}=DIR to a folder of codes, which python -m "
            "fvq_jax.tokenize extract writes",
        )


def _check_samples(config: ConfigDict) -> None:
    """Samples that are scored need a tokenizer, and guidance needs a network that knows pictures without a class."""
    evaluation, guidances = config.eval, config.eval.guidances
    if not evaluation.samples:
        return
    require(bool(config.data.tokenizer), "eval.samples needs data.tokenizer: the tokenizer that decodes samples")
    require(
        evaluation.samples >= config.generator.classes,
        f"eval.samples {evaluation.samples} is below the {config.generator.classes} classes: draw at least one of each",
    )
    require(
        len(guidances) > 0 and all(isinstance(value, int | float) and value >= 0 for value in guidances),
        f"config field eval.guidances must be numbers of 0 or more such as (1, 1.75), not {guidances}",
    )
    require(
        config.generator.class_dropout > 0 or max(guidances) <= 1,
        f"eval.guidances {tuple(guidances)}: guidance above 1 needs generator.class_dropout above 0 in training",
    )


def _check_network(config: ConfigDict) -> None:
    model = config.generator
    grid = tuple(model.grid)
    require(
        len(grid) == 2 and all(type(side) is int and side > 0 for side in grid),
        f"config field generator.grid must be two positive whole numbers such as (16, 16), not {model.grid}",
    )
    width, heads = model.width, model.heads
    require(
        width % heads == 0,
        f"generator.width {width} is not divisible by generator.heads {heads}: set generator.width to "
        f"{near(width, heads)}",
    )
    head = width // heads
    require(
        head % _HEAD_UNIT == 0,
        f"generator.width {width} / generator.heads {heads} = {head} channels of a head, which is not a multiple of "
        f"{_HEAD_UNIT}: set generator.width to {near(width, _HEAD_UNIT * heads)}",
    )


def _check_unroll(config: ConfigDict) -> None:
    require(
        not (config.generator.unroll and config.generator.remat),
        "generator.unroll keeps what generator.remat would save: set only one of them",
    )


def _check_layout(config: ConfigDict, devices: int) -> None:
    """Every array is divided evenly over the mesh, see `models.gpt.RULES`."""
    model = config.generator
    data, codebook = mesh_shape(config.mesh.data, config.mesh.codebook, devices)
    for name, size, unit, by in (
        ("generator.vocab", model.vocab, codebook, f"mesh.codebook={codebook}"),
        ("generator.width", model.width, data, f"mesh.data={data}"),
        ("generator.width", model.width, codebook, f"mesh.codebook={codebook}"),
        ("the feed-forward width (generator.hidden)", hidden(config), data, f"mesh.data={data}"),
        ("the feed-forward width (generator.hidden)", hidden(config), codebook, f"mesh.codebook={codebook}"),
    ):
        require(
            size % unit == 0,
            f"{name} {size} is not divisible by {by}, over which arrays are divided: use {near(size, unit)}, or "
            "another mesh",
        )
