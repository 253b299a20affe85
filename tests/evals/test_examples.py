import numpy as np
import pytest

from fvq_jax.evals.examples import EXTREMES, ExampleCollector
from tests.helpers.two_hosts import on_two_hosts

TOTAL = 50


def picture(position):
    return np.full((4, 4, 3), position, np.uint8)


def scores():
    """A PSNR for each of the pictures, some of them equal."""
    return np.round(np.random.default_rng(0).normal(25, 2, TOTAL))


def collected(batches, metric="psnr", spread=5):
    collector = ExampleCollector(spread, TOTAL, lambda position: f"{position}.png")
    for batch in batches:
        batch = np.array(batch, int)
        pictures = (
            np.stack([picture(position) for position in batch]) if len(batch) else np.zeros((0, 4, 4, 3), np.uint8)
        )
        collector.add(batch, {metric: scores()[batch], "l1": batch / 100}, pictures, 255 - pictures)
    return collector


def positions(found):
    return {kind: [example.position for example in getattr(found, kind)] for kind in ("spread", "worst", "best")}


def by_hand(values):
    return {
        "spread": [0, 10, 20, 30, 40],
        "worst": sorted(range(TOTAL), key=lambda i: (values[i], i))[:EXTREMES],
        "best": sorted(range(TOTAL), key=lambda i: (-values[i], i))[:EXTREMES],
    }


@pytest.mark.parametrize("size", [1, 7, 50])
def test_batches_of_any_size_give_the_same_examples(size):
    batches = [range(start, min(start + size, TOTAL)) for start in range(0, TOTAL, size)]
    found = collected(batches).result(4)
    assert positions(found) == by_hand(scores())
    assert found.ranked_by == "psnr"
    check(found)


def check(found):
    for example in (*found.spread, *found.worst, *found.best):
        assert example.name == f"{example.position}.png"
        assert example.scores == {"psnr": scores()[example.position], "l1": example.position / 100}
        np.testing.assert_array_equal(example.original, picture(example.position))
        np.testing.assert_array_equal(example.reconstruction, 255 - picture(example.position))


def test_lpips_goes_before_psnr_and_is_better_when_small():
    found = collected([range(TOTAL)], metric="lpips_vgg").result(4)
    assert found.ranked_by == "lpips_vgg"
    assert positions(found) == by_hand(-scores())


def test_fewer_pictures_than_examples():
    found = collected([[3, 10]]).result(4)
    assert positions(found)["spread"] == [10]
    assert sorted(positions(found)["worst"]) == sorted(positions(found)["best"]) == [3, 10]


def test_two_hosts_find_the_examples_of_one(monkeypatch):
    """The second has none of the spread ones, and each some of the best and worst."""
    shares = [[p for p in range(TOTAL) if p % 10 < 4], [p for p in range(TOTAL) if p % 10 >= 4]]
    collectors = [collected([share[:9], share[9:]]) for share in shares]
    for found in on_two_hosts(monkeypatch, lambda index: collectors[index].result(4)):
        assert positions(found) == by_hand(scores())
        check(found)


def test_two_hosts_of_which_one_has_no_picture(monkeypatch):
    collectors = [collected([[3, 10]]), collected([[]])]
    for found in on_two_hosts(monkeypatch, lambda index: collectors[index].result(4)):
        assert positions(found)["spread"] == [10]
        assert sorted(positions(found)["worst"]) == [3, 10]
        check(found)
