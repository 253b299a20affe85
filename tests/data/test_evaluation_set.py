import pickle

import numpy as np
import pytest

from fvq_jax.data.evaluation_set import Sample
from fvq_jax.data.pipeline import eval_batches


class Numbers:
    """Records that are their own index, ten to a class."""

    def __len__(self):
        return 1000

    def __getitem__(self, index):
        return {"image": np.full((4, 4, 3), index % 251, np.uint8), "label": np.int32(index // 10)}

    def name(self, index):
        return f"number {index}"

    def fingerprint(self):
        return "1000 numbers"


def labels(source):
    return [int(source[position]["label"]) for position in range(len(source))]


def test_all_records_come_once_in_an_order_that_is_always_the_same():
    sample = Sample(Numbers(), 1000)
    names = [sample.name(position) for position in range(1000)]
    assert sorted(names) == sorted(f"number {index}" for index in range(1000))
    assert names == [pickle.loads(pickle.dumps(sample)).name(position) for position in range(1000)]
    assert labels(sample)[7] == int(names[7].split()[1]) // 10


def test_classes_are_mixed_in_every_part():
    parts = np.array(labels(Sample(Numbers(), 1000))).reshape(10, 100)
    assert min(len(set(part)) for part in parts) > 50  # in the source's own order: 10


@pytest.mark.parametrize("count", [1, 7, 100])
def test_a_part_is_spread_evenly_over_the_source(count):
    sample = Sample(Numbers(), count)
    indices = sorted(int(sample.name(position).split()[1]) for position in range(count))
    assert indices == [index * 1000 // count for index in range(count)]
    assert str(count) in sample.fingerprint()
    assert sample.fingerprint() != Sample(Numbers(), count + 1).fingerprint()


def test_the_pipeline_takes_it():
    (batch,) = eval_batches(Sample(Numbers(), 16), image_size=4, batch_size=16)
    assert batch["label"].tolist() == labels(Sample(Numbers(), 16))
