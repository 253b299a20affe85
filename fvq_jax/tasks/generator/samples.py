"""Draws samples of a generator while it trains, and scores them as `fvq_jax.evaluate` scores finished ones.

Every set of samples is drawn with one guidance. A classifier of real pictures says whether they look like their class,
and InceptionV3 compares them with a reference, as far as the config names pictures, network and reference.
"""

import dataclasses
import functools
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int64, UInt8
from ml_collections import ConfigDict

from fvq_jax.data.crops import RandomCrops
from fvq_jax.data.evaluation_set import Sample
from fvq_jax.data.npz_rows import ImageReader
from fvq_jax.data.pipeline import eval_batches
from fvq_jax.data.record import Source
from fvq_jax.data.sources import kind_of, make_source
from fvq_jax.evals import generation
from fvq_jax.evals.class_accuracy import ClassJudge
from fvq_jax.evals.inception import load_inception
from fvq_jax.evals.reference import read_statistics
from fvq_jax.inference.generator import Generator
from fvq_jax.inference.generator_options import check_tokenizer
from fvq_jax.inference.saved_generator import Provenance, SavedGenerator
from fvq_jax.inference.tokenizer import Tokenizer
from fvq_jax.models.gpt import GPT
from fvq_jax.ops.pixels import to_uint8
from fvq_jax.report.generator import SampleSet, best_of, first_of_classes
from fvq_jax.runtime.errors import require
from fvq_jax.runtime.hosts import rows_of_all_hosts
from fvq_jax.runtime.mesh import replicated

_REAL_TO_LEARN, _REAL_HELD_OUT = 4000, 2000  # pictures, at most, from which the classifier learns and is itself scored
_HELD_OUT = 5  # one picture in so many of a folder is held out
_READ = 100  # pictures read at once
Pictures = UInt8[np.ndarray, "n H W 3"]
Labels = Int64[np.ndarray, "n"]


class Samples:
    """Draws and scores samples of states of one run, all by the same compiled programs. All processes call it."""

    def __init__(self, config: ConfigDict, mesh: Mesh, net: GPT, provenance: Mapping[str, Any]):
        """Opens the files that the config names. InputError if one is missing or does not fit."""
        self._config, self._mesh = config, mesh
        self._net = net.clone(mesh=None, remat=False, unroll=False)
        self._provenance = Provenance(**{**provenance, "class_names": tuple(provenance["class_names"])})
        self._generator: Generator | None = None
        self._tokenizer = Tokenizer.from_pretrained(config.data.tokenizer)
        _check_fits(self._net, self._provenance, self._tokenizer)
        evaluation, self._inception, self._reference = config.eval, None, None
        self._real = _real_pictures(evaluation.pictures, self._size) if evaluation.pictures else None
        if evaluation.inception or evaluation.reference:
            for name in ("inception", "reference"):
                path = evaluation[name]
                require(os.path.isfile(path), f"eval.{name}: there is no file {path!r} (FID needs both files, or none)")
            self._inception = load_inception(evaluation.inception, spatial=True)
            self._reference = _read_reference(evaluation.reference, self._inception, self._size)

    def evaluate(
        self, params: Any, progress: Callable[[int], Any] = lambda done: None
    ) -> tuple[dict[str, float], list[SampleSet]]:
        """Draws `eval.samples` samples for each of `eval.guidances`; `progress` is called between the sets.

        Returns the scores of the best set, with some figures about all, and the sets.
        """
        generator = self._with(params)
        sets, rates = [], []
        for guidance in self._config.eval.guidances:
            progress(0)
            began = time.monotonic()
            images = self._drawn(generator, float(guidance))
            rates.append(len(images) / (time.monotonic() - began))
            scores = {}
            if self._judge is not None:
                scores["class_accuracy"] = self._judge[0].accuracy(images, self._labels)
            if self._reference is not None:
                assert self._inception is not None
                starts = range(jax.process_index() * _READ, len(images), jax.process_count() * _READ)
                scores |= generation.score(
                    (images[start : start + _READ] for start in starts),
                    self._reference,
                    self._inception,
                    images=len(images),
                    batch_size=_READ,
                )
            shown, captions = first_of_classes(self._labels, self._provenance.class_names, each=self._config.log.images)
            name = f"guidance {guidance:g}"
            sets.append(SampleSet(name, scores, len(images), float(guidance), images[shown], captions))
        best = best_of(sets)
        assert best is not None
        metrics = dict(best.metrics)
        for one in sets:
            if one.guidance == 1 and "class_accuracy" in one.metrics:
                metrics["class_accuracy_unguided"] = one.metrics["class_accuracy"]
        if self._judge is not None:
            metrics["class_accuracy_of_real"] = self._judge[1]
        if metrics:
            assert best.guidance is not None
            metrics["best_guidance"] = best.guidance
        # The first set of a kind waits for its program to be compiled.
        metrics["samples_per_second"] = rates[-1]
        return metrics, sets

    def _with(self, params: Any) -> Generator:
        """The generator with parameters of the run, which are gathered on every device."""
        whole = jax.device_get(self._gather(params))
        if self._generator is None:
            saved = SavedGenerator(self._net, whole, self._provenance)
            self._generator = Generator(saved, self._tokenizer, dtype=self._net.dtype)
        self._generator = self._generator.with_params(whole)
        return self._generator

    @functools.cached_property
    def _gather(self) -> Callable[[Any], Any]:
        return jax.jit(lambda params: params, out_shardings=replicated(self._mesh))

    @functools.cached_property
    def _labels(self) -> Labels:
        """The class of every sample: image i is of class i modulo the number of classes, so that they lie mixed."""
        return np.arange(self._config.eval.samples) % self._net.classes

    def _drawn(self, generator: Generator, guidance: float) -> Pictures:
        """All samples of a set, in every process; each process draws its share of them."""
        options = {name: self._config.eval[name] for name in ("temperature", "top_k", "top_p")}
        count, hosts, host = len(self._labels), jax.process_count(), jax.process_index()
        share = -(-count // hosts)
        # All shares must be equally long, so the last one may draw some images of the first one again.
        numbers = (host * share + np.arange(share)) % count
        images = generator.sample(
            self._labels[numbers], self._config.seed, numbers=numbers, guidance=guidance, **options
        )
        return rows_of_all_hosts(np.asarray(to_uint8(images)))[:count]

    @functools.cached_property
    def _judge(self) -> tuple[ClassJudge, float] | None:
        """A classifier of real pictures and its accuracy on held-out ones; None if the config names no pictures.

        Every process trains the same one.
        """
        if self._real is None:
            return None
        learn, held_out = self._real
        judge = ClassJudge.fit(*_read(learn, self._size))
        return judge, judge.accuracy(*_read(held_out, self._size))

    @property
    def _size(self) -> int:
        """The side of a sample, in pixels."""
        return self._net.grid[0] * self._tokenizer.downsampling


def _check_fits(net: GPT, provenance: Provenance, tokenizer: Tokenizer) -> None:
    """Raises InputError if the tokenizer cannot decode the samples: now, and not in the first evaluation."""
    check_tokenizer(SavedGenerator(net, {}, provenance), tokenizer)
    require(
        not tokenizer.classes or provenance.condition != "",
        "eval.samples: data.tokenizer has a table per class, and the codes in data.train_dir do not say with which "
        "they were extracted: set eval.samples to 0, and draw samples later by fvq_jax.sample --condition=...",
    )


def _read_reference(path: str, inception: generation.Inception, size: int) -> generation.Reference:
    """The statistics in a reference file; if it has only pictures, those of the pictures, and their features."""
    known = read_statistics(path)
    if known is not None:
        return generation.Reference(*known, None)
    pictures = ImageReader(path)
    require(
        pictures.shape[1:3] == (size, size),
        f"eval.reference {path} has pictures of {pictures.shape[1]} x {pictures.shape[2]} pixels, and samples have "
        f"{size} x {size}",
    )
    batches = pictures.batches(_READ, part=jax.process_index(), parts=jax.process_count())
    return generation.Reference.of(generation.collect(batches, inception, images=len(pictures), batch_size=_READ))


def _real_pictures(path: str, size: int) -> tuple[Source, Source]:
    """Real pictures to learn from, and held-out ones."""
    kind = kind_of(path)
    if kind == "photos":
        photos = make_source(kind, "train", image_size=size)
        return RandomCrops(photos, _REAL_TO_LEARN, size), make_source(
            kind, "eval", image_size=size, eval_images=_REAL_HELD_OUT
        )
    everything = make_source(kind, "eval", image_size=size, eval_dir=path)
    mixed = Sample(everything, min(len(everything), _REAL_TO_LEARN + _REAL_HELD_OUT))
    return _Part(mixed, held_out=False), _Part(mixed, held_out=True)


@dataclasses.dataclass(frozen=True)
class _Part:
    """One picture in five of a mixed source, or all others."""

    source: Sample[Any]
    held_out: bool

    @functools.cached_property
    def _indices(self) -> list[int]:
        return [i for i in range(len(self.source)) if (i % _HELD_OUT == 0) == self.held_out]

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Any:
        return self.source[self._indices[index]]

    def name(self, index: int) -> str:
        return self.source.name(self._indices[index])

    def fingerprint(self) -> str:
        return f"{len(self)} pictures of {self.source.fingerprint()}"


def _read(source: Source, size: int) -> tuple[Pictures, Labels]:
    """All pictures of a source, central crops of `size` pixels, with their labels."""
    batches = eval_batches(source, image_size=size, batch_size=_READ)
    try:
        found = [(batch["image"][batch["mask"]], batch["label"][batch["mask"]]) for batch in batches]
    finally:
        batches.close()
    images, labels = (np.concatenate(part) for part in zip(*found, strict=True))
    return images, labels.astype(np.int64)
