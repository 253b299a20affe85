"""A second task, as small as it can be: regression on synthetic vectors, with dropout and AdamW.

It shows that the loop knows no task. It has what a tokenizer's training has not: random numbers in the step, weight
decay for matrices only, state (a running mean of the inputs) of its main network, no pictures.
"""

import itertools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

from fvq_jax.runtime.fields import Field
from fvq_jax.runtime.mesh import global_batch
from fvq_jax.tasks import default_config
from fvq_jax.training.task import Evaluation, Gradients, Task

INPUTS = 8
EXAMPLES = {"train": 64, "eval": 32}


class Regressor(nn.Module):
    """One hidden layer with dropout; inputs are centred by their running mean."""

    width: int
    dropout: float

    @nn.compact
    def __call__(self, x, *, train):
        mean = self.variable("running", "mean", jnp.zeros, (INPUTS,))
        if train and self.is_mutable_collection("running"):
            mean.value += 0.1 * (x.mean(axis=0) - mean.value)
        h = nn.relu(nn.Dense(self.width, name="hidden")(x - mean.value[None]))
        h = nn.Dropout(self.dropout, deterministic=not train)(h)
        return nn.Dense(1, name="out")(h)[:, 0]


class Vectors:
    """The examples of a split: y = sum of squares of x, x normal."""

    def __init__(self, split):
        rng = np.random.default_rng(len(split))
        self.x = rng.normal(1.0, 1.0, (EXAMPLES[split], INPUTS)).astype(np.float32)
        self.y = np.square(self.x).sum(axis=1)

    def __len__(self):
        return len(self.x)

    def fingerprint(self):
        return f"{len(self)} vectors"


class VectorBatches:
    """Batch s holds the examples that (seed, s) draws."""

    def __init__(self, source, size, seed, step):
        self.skipped = {}
        self._source, self._size, self._seed = source, size, seed
        self._steps = itertools.count(step)

    def __iter__(self):
        return self

    def __next__(self):
        rng = np.random.default_rng((self._seed, next(self._steps)))
        rows = rng.integers(0, len(self._source), self._size)
        return {"x": self._source.x[rows], "y": self._source.y[rows]}

    def close(self):
        pass


class RegressionTask(Task):
    """Registered by tests as `regression`."""

    unit = "vectors"
    main = "regressor"
    headline = ("error",)
    scores = ("error",)
    dtype = jnp.float32
    rules = ((r"^(networks|ema)/.*(hidden|out)/", P()), (r"/running/mean$", P()))

    @classmethod
    def fields(cls, config=None):
        return {
            "regressor.width": Field(16, "Hidden units.", above=0, stays=True),
            "regressor.dropout": Field(0.5, "Share of hidden units that are dropped.", below=1),
            "optim.weight_decay": Field(0.1, "Of matrices."),
        }

    @classmethod
    def check(cls, config, devices):
        pass

    @classmethod
    def plannable(cls, config, devices):
        return {"eval.batch_size": devices}

    def __init__(self, config, mesh):
        self._config, self._mesh = config, mesh
        self._net = Regressor(config.regressor.width, config.regressor.dropout)
        self._sources = {split: Vectors(split) for split in EXAMPLES}

    def init(self, key):
        return {"regressor": dict(self._net.init(key, jnp.zeros((1, INPUTS)), train=False))}

    def load(self, path):
        with np.load(path) as file:
            return {name: {leaf: file[f"{name}/{leaf}"] for leaf in ("kernel", "bias")} for name in ("hidden", "out")}

    def optimizers(self, annealing):
        def is_matrix(params):
            return jax.tree.map(lambda leaf: leaf.ndim > 1, params)

        optim = self._config.optim
        rate = annealing.rate(optim.learning_rate)
        return {"regressor": optax.adamw(rate, optim.b1, optim.b2, weight_decay=optim.weight_decay, mask=is_matrix)}

    @property
    def frozen(self):
        return {}

    def abstract_frozen(self):
        return {}

    def batch_spec(self):
        size = self._config.batch_size
        return {"x": jax.ShapeDtypeStruct((size, INPUTS), jnp.float32), "y": jax.ShapeDtypeStruct((size,), jnp.float32)}

    def gradients(self, state, batch, key, frozen):
        network = state.networks["regressor"]

        def loss(params):
            predicted, variables = self._net.apply(
                {"params": params, **network.variables},
                batch["x"],
                train=True,
                rngs={"dropout": key},
                mutable="running",
            )
            return jnp.mean(jnp.square(predicted - batch["y"])), variables

        (value, variables), grads = jax.value_and_grad(loss, has_aux=True)(network.params)
        positive = jnp.sum(batch["x"] > 0, axis=0)
        return Gradients({"regressor": grads}, {"loss/total": value}, {"positive": positive}, {"regressor": variables})

    def batch_scalars(self, counts):
        return {"positive/batch": jnp.mean(counts["positive"].astype(jnp.float32))}

    def uncounted_flops(self, platform):
        return 0.0, 1.0

    def source(self, split):
        return self._sources[split]

    def batches(self, step):
        share = self._config.batch_size // jax.process_count()
        return VectorBatches(self._sources["train"], share, self._config.seed, step)

    def window_scalars(self, counts):
        return {"positive/window": float(counts["positive"].mean())}

    def progress(self, scalars):
        return {"loss": f"{scalars['loss/total']:.3f}"}

    def log_start(self):
        pass

    def open_files(self):
        pass

    def evaluate(self, state, progress=lambda done: None):
        source, network = self._sources["eval"], state.networks["regressor"]
        variables = {"params": state.ema or network.params, **network.variables}
        x = global_batch({"x": source.x}, self._mesh)["x"]
        error = np.asarray(jax.jit(lambda v, x: self._net.apply(v, x, train=False))(variables, x)) - source.y
        progress(len(source))
        metrics = {"error": float(np.abs(error).mean())}
        return Evaluation(metrics, {"vectors": len(source)}, f"error {metrics['error']:.3f}", {})

    def report(self, state, evaluation, workdir, rows):
        (workdir / "report.json").write_text(json.dumps({"error": evaluation.metrics["error"], "rows": len(rows)}))


SMALL = {
    "steps": 6,
    "epochs": 0.0,
    "batch_size": 16,
    "optim.learning_rate": 1e-2,
    "optim.warmup_steps": 1,
    "optim.warmup_epochs": 0.0,
    "optim.accumulate": 2,
    "optim.ema_decay": 0.5,
    "eval.batch_size": 16,
    "eval.every_steps": 3,
    "checkpoint.every_steps": 2,
    "checkpoint.keep_last": 3,
    "log.every_steps": 1,
}


def regression_config(**changes):
    """A run of six steps, with everything that has a state; the task must be registered."""
    config = default_config("regression")
    config.update_from_flattened_dict(SMALL | changes)
    return config
