"""The contract of a task: what the training loop, which knows no network, needs to know of what is trained.

A command picks the task class by the config (`tasks.TASKS`) and passes it in; `fvq_jax.training` imports no task. The
loop asks the task for data, gradients and evaluations, and does the rest: accumulation, updates, averages, checkpoints,
logs, resuming.
"""

import abc
import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import UInt8
from ml_collections import ConfigDict

from fvq_jax.runtime.fields import Field
from fvq_jax.runtime.mesh import Rules
from fvq_jax.training.optim import Annealing
from fvq_jax.training.state import TrainState


@runtime_checkable
class Source(Protocol):
    """The data of a split, as far as the loop knows it."""

    def __len__(self) -> int:
        """How many examples there are, which is the length of an epoch."""
        ...

    def fingerprint(self) -> str:
        """A text that changes if the examples change, not if they move: a resumed run must see the same ones."""
        ...


@runtime_checkable
class Mendable(Protocol):
    """A source whose unreadable examples may be removed or repaired between two starts of a run."""

    def fingerprint_without(self, left_out: Collection[str]) -> str:
        """A text that changes if examples change other than those with these names, as `Batches.skipped` names them."""
        ...


@runtime_checkable
class Batches(Protocol):
    """The endless batches of this process."""

    @property
    def skipped(self) -> Mapping[str, Any]:
        """The examples that could not be read so far, by a name that does not depend on where the data lie."""
        ...

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]: ...

    def __next__(self) -> dict[str, np.ndarray]: ...

    def close(self) -> None:
        """Ends the threads and processes that work for it."""
        ...


@dataclasses.dataclass(frozen=True)
class Gradients:
    """What one micro-batch gives: gradients, and what else comes of the forward pass.

    Attributes:
      grads: by network, with the structure of its parameters.
      scalars: float32 by name, such as loss/total; means over the micro-batch.
      counts: integer arrays by name, for instance how often each code was chosen; summed over micro-batches and steps.
      variables: by network, everything in its variables but the parameters, as it is after this micro-batch.
    """

    grads: dict[str, Any]
    scalars: dict[str, Any]
    counts: dict[str, Any]
    variables: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
      metrics: by name; logged as eval/NAME.
      facts: whole numbers for the result line, such as how many images were scored.
      line: the most important metrics in one line, for the log.
      pictures: for TensorBoard, by name.
      details: what the task's own report needs.
    """

    metrics: dict[str, float | int]
    facts: dict[str, int]
    line: str
    pictures: dict[str, UInt8[np.ndarray, "H W c"]]
    details: Any = None


class Task(abc.ABC):
    """One kind of training, of one or more networks.

    Attributes:
      unit: what an example is, in the plural, for rates: images_per_second.
      main: the network that is averaged, evaluated and exported.
      headline: metrics of an evaluation that the result line shows, in this order.
      scores: those of them that a sweep draws for all its runs.
      dtype: the dtype in which most of the step is computed.
      frozen: arrays that a step reads and never changes, for instance the weights of a loss; {} if there are none.
      rules: the layout of every array of the state, by its path.
    """

    unit: ClassVar[str]
    main: ClassVar[str]
    headline: ClassVar[Sequence[str]]
    scores: ClassVar[Sequence[str]]
    dtype: DTypeLike
    rules: Rules

    @classmethod
    @abc.abstractmethod
    def fields(cls, config: ConfigDict | None = None) -> dict[str, Field]:
        """The fields of its configs beyond the shared ones, by full name.

        With a `config`, those that it should have, since the value of one field may decide which others there are;
        without, those of the default config.
        """

    @classmethod
    @abc.abstractmethod
    def check(cls, config: ConfigDict, devices: int) -> None:
        """Raises InputError, saying what would work, for a config that cannot run on so many devices."""

    @classmethod
    @abc.abstractmethod
    def plannable(cls, config: ConfigDict, devices: int) -> dict[str, Any]:
        """Fields to replace, by full name, if only the step is compiled and data and evaluation are not needed."""

    @abc.abstractmethod
    def __init__(self, config: ConfigDict, mesh: Mesh) -> None:
        """Makes the task from a validated config and the mesh. Cheap: no file is opened."""

    # --- networks -----------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def init(self, key: jax.Array) -> dict[str, dict[str, Any]]:
        """The variables of every network, by name: `params`, and other Linen collections if it has any."""

    @abc.abstractmethod
    def load(self, path: str) -> Any:
        """Parameters of the main network, on the host, from what `init_from` names. InputError if they do not fit."""

    @abc.abstractmethod
    def optimizers(self, annealing: Annealing) -> dict[str, optax.GradientTransformation]:
        """The optimizer of every network; their rates follow the annealing of the run."""

    # --- a step -------------------------------------------------------------------------------------------------

    @property
    @abc.abstractmethod
    def frozen(self) -> dict[str, Any]:
        """The frozen arrays, read from their files when first asked for. InputError if a file is missing or wrong."""

    @abc.abstractmethod
    def abstract_frozen(self) -> dict[str, Any]:
        """Shapes, dtypes and layout of `frozen`, for compiling a step without the files."""

    @abc.abstractmethod
    def batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of a whole batch, over all processes."""

    @abc.abstractmethod
    def gradients(self, state: TrainState, batch: dict[str, Any], key: jax.Array, frozen: dict[str, Any]) -> Gradients:
        """Gradients at the parameters of `state`; a pure function. `key` belongs to this micro-batch alone."""

    @abc.abstractmethod
    def batch_scalars(self, counts: dict[str, Any]) -> dict[str, Any]:
        """Scalars of one step that follow from the counts of its whole batch; part of the compiled step."""

    @abc.abstractmethod
    def uncounted_flops(self, platform: str) -> tuple[float, float]:
        """(flops of a step, over all devices, that XLA does not count; matrix-unit passes that each of them takes)."""

    # --- data ---------------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def source(self, split: Literal["train", "eval"]) -> Source:
        """The examples of "train" or "eval", always as the same object. InputError if they are not available."""

    @abc.abstractmethod
    def batches(self, step: int) -> Batches:
        """This process's share of the endless training batches, starting at `step`; (seed, step) determine a batch."""

    def provenance(self) -> dict[str, Any]:
        """What a user of the main network must know of its data, as JSON; kept as a file of the workdir unless {}."""
        return {}

    # --- figures ------------------------------------------------------------------------------------------------

    def parts(self) -> dict[str, int]:
        """What an example is made of, and of how many, in the plural: {"tokens": 256} adds tokens_per_second."""
        return {}

    @abc.abstractmethod
    def window_scalars(self, counts: dict[str, np.ndarray]) -> dict[str, float]:
        """Scalars that follow from the counts of all steps since the last line of metrics."""

    @abc.abstractmethod
    def progress(self, scalars: Mapping[str, float]) -> dict[str, str]:
        """What the progress line shows of a step's scalars, as text by name."""

    @abc.abstractmethod
    def log_start(self) -> None:
        """Logs what a person should know about the run before it begins, for instance losses that are switched off."""

    @abc.abstractmethod
    def open_files(self) -> None:
        """Opens all other files that the run will need, so that a missing one is named before anything compiles."""

    @abc.abstractmethod
    def evaluate(self, state: TrainState, progress: Callable[[int], Any]) -> Evaluation:
        """Scores a state without changing it; all processes call it.

        It calls `progress` now and then with the number of examples done since the last call.
        """

    @abc.abstractmethod
    def report(
        self, state: TrainState, evaluation: Evaluation, workdir: Path, rows: Sequence[Mapping[str, Any]]
    ) -> None:
        """Writes the run's report into `workdir`; all processes call it.

        `rows` are all metrics of the run, as the first process reads them; the other processes pass [].
        """
