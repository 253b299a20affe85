"""The settings that every run has, whatever it trains. The defaults are the paper's recipe (arXiv 2509.10140).

A task adds its own settings (`Task.fields`), and so does a quantizer; together they are all the fields of a config.
`python -m fvq_jax.main --config=FILE --explain` prints them with their values.
"""

from collections.abc import Mapping

from ml_collections import ConfigDict

from fvq_jax.runtime.fields import Field, Needs
from fvq_jax.runtime.names import nest

DECAYS = ("linear", "cosine", "constant")
# A rate that falls: that of all, or that of a quantizer of its own.
_FALLS = Needs(("optim.decay", "optim.codebook_decay"), but=("constant",))

SHARED: dict[str, Field] = {
    "task": Field("tokenizer", "What is trained: a name in fvq_jax/tasks/__init__.py.", stays=True),
    "seed": Field(
        0, "Decides the initial weights, the order of the data and all random numbers.", most=2**32 - 1, stays=True
    ),
    "batch_size": Field(128, "Examples in one step, over all devices and hosts.", above=0, stays=True),
    "steps": Field(0, "Length of the run in steps; 0: the field epochs gives it."),
    "epochs": Field(40.0, "Length of the run in epochs; 0: the field steps gives it."),
    "init_from": Field(
        "", "Where the main network of a new run starts: file, saved network, workdir or WORKDIR/checkpoints/step_N."
    ),
    "on_nan": Field(
        "stop",
        "If a loss or gradient is not finite: stop, or skip and count the step; after 100 in a row stop too.",
        choices=("stop", "skip"),
    ),
    "mesh.data": Field(-1, "Size of the mesh's data axis; -1: all devices that are left.", least=None),
    "mesh.codebook": Field(1, "Size of the mesh's codebook axis, which divides rows of the codebook.", least=None),
    "mesh.cpu_devices": Field(
        1,
        "As how many devices a CPU counts; 0: one for each core, at most 8, as far as they fit mesh and batches. "
        "Without effect on accelerators, with several processes, and beside JAX_NUM_CPU_DEVICES.",
    ),
    "optim.learning_rate": Field(1e-4, "Peak learning rate.", above=0),
    "optim.b1": Field(0.9, "Adam's decay of the mean gradient.", below=1),
    "optim.b2": Field(0.95, "Adam's decay of the mean squared gradient.", below=1),
    "optim.clip_norm": Field(1.0, "Largest gradient norm of each network; 0: not clipped."),
    "optim.warmup_steps": Field(0, "Length of the warm-up in steps; 0: the field warmup_epochs gives it."),
    "optim.warmup_epochs": Field(4.0, "Length of the warm-up in epochs; 0: the field warmup_steps gives it."),
    "optim.hold": Field(
        0.3, "Share of the steps after the warm-up during which the rate stays at its peak.", below=1, needs=(_FALLS,)
    ),
    "optim.decay": Field("linear", "How the rate falls after the hold.", choices=DECAYS),
    "optim.start_factor": Field(
        0.005,
        "Share of the peak rate with which the warm-up starts.",
        needs=(Needs(("optim.warmup_steps", "optim.warmup_epochs")),),
    ),
    "optim.end_factor": Field(0.01, "Share of the peak rate with which the run ends.", needs=(_FALLS,)),
    "optim.accumulate": Field(1, "Micro-batches into which the batch of a step is cut.", above=0),
    "optim.ema_decay": Field(0.0, "Decay of the main network's moving average; 0: there is none.", below=1, stays=True),
    "data.num_workers": Field(8, "Processes per host that prepare batches; 0: threads of the run's own process do."),
    "data.timeout": Field(50.0, "End the run if no batch comes for so many seconds (5x for the first); 0: never."),
    "eval.every_steps": Field(
        0, "Steps between two evaluations; 0: only at the end.", late="it is evaluated at its end only"
    ),
    "eval.batch_size": Field(128, "Examples in one batch of an evaluation, over all devices and hosts.", above=0),
    "checkpoint.every_steps": Field(
        5000, "Steps between two checkpoints.", above=0, late="it is saved at its end only, so a crash loses all of it"
    ),
    "checkpoint.keep_last": Field(2, "How many of the newest checkpoints are kept.", above=0),
    "checkpoint.keep_every": Field(
        0,
        "Steps between checkpoints that are kept for good, a multiple of every_steps; 0: none.",
        late="none is kept for good",
    ),
    "log.every_steps": Field(
        100, "Steps between two lines of metrics.", above=0, late="its only line of metrics is that of the last step"
    ),
}


def make_config(fields: Mapping[str, Field]) -> ConfigDict:
    """A config with the defaults of these fields (by full name); locked, so that a misspelt field raises."""
    return ConfigDict(nest({name: field.default for name, field in fields.items()}, ".")).lock()
