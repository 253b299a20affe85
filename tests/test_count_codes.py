"""The benchmark that counts codes finds those that the tokenizer itself finds."""

import numpy as np
import pytest

from benchmarks import count_codes
from fvq_jax.data.crops import RandomCrops
from fvq_jax.data.folder import FolderSource
from fvq_jax.inference.saved import SavedTokenizer
from fvq_jax.inference.tokenizer import Tokenizer
from fvq_jax.models.quantizers.fsq import FSQuantizer
from fvq_jax.models.tokenizer import TokenizerNet
from fvq_jax.runtime.errors import InputError
from tests.helpers.pictures import damage, write_pictures
from tests.helpers.random_tokenizer import NETWORK, random_params, random_tokenizer
from tests.helpers.trained_workdir import trained_workdir

SIZE, CROPS, PER_CODE = 8, 52, 13  # 16 tokens a crop, 64 codes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures")
    write_pictures(path, [f"{number}.png" for number in range(7)])
    return path


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "saved"
    Tokenizer(random_tokenizer()).save_pretrained(path)
    return path


def count(tokenizer, folder, out, *more):
    options = [f"--tokenizer={tokenizer}", f"--data={folder}", f"--out={out}", f"--size={SIZE}", "--resize-min=0"]
    return count_codes.count(count_codes.parse([*options, f"--per-code={PER_CODE}", "--batch=5", *more]))


@pytest.mark.parametrize("unit_length", [False, True])
def test_counts_are_those_of_the_tokenizer(folder, tmp_path, unit_length):
    tokenizer = Tokenizer(random_tokenizer(l2_normalize=unit_length))
    tokenizer.save_pretrained(tmp_path / "saved")
    rows = list(count(tmp_path / "saved", folder, tmp_path / "counts.npz", "--seed=3"))
    crops = RandomCrops(FolderSource(folder), CROPS, SIZE, seed=3)
    codes = tokenizer.encode(np.stack([crops[i]["image"] for i in range(CROPS)]))
    expected = np.bincount(codes.reshape(-1), minlength=64)
    assert expected.min() == 0
    np.testing.assert_array_equal(np.load(tmp_path / "counts.npz")["counts"], expected)
    assert [row["tokens"] for row in rows] == sorted({row["tokens"] for row in rows})
    assert len(rows) > 2
    last = rows[-1]
    assert (last["tokens"], last["codes"], last["dead_codes"]) == (16 * CROPS, 64, (expected == 0).sum())
    assert last["usage"] == pytest.approx((expected > 0).mean())


def test_codes_are_found_in_a_tree(saved):
    assert count_codes.load_with_tree(saved).net.quantizer.search_implementation == "tree"


def test_a_count_that_was_stopped_goes_on(saved, folder, tmp_path):
    whole = list(count(saved, folder, tmp_path / "whole.npz"))[-1]
    stopped = count(saved, folder, tmp_path / "part.npz")
    for _ in range(3):
        next(stopped)
    stopped.close()
    assert 0 < np.load(tmp_path / "part.npz")["first"] < CROPS
    rest = list(count(saved, folder, tmp_path / "part.npz"))
    (again,) = count(saved, folder, tmp_path / "part.npz")
    for row in (rest[-1], again):
        assert row == {name: value for name, value in whole.items() if name in again} | {
            name: row[name] for name in row.keys() - again.keys()
        }
    with pytest.raises(InputError, match="has the counts of other crops or another tokenizer: name another file"):
        next(count(saved, folder, tmp_path / "part.npz", "--seed=1"))


def test_crops_that_cannot_be_read_are_not_counted(saved, folder, tmp_path):
    write_pictures(tmp_path, [f"{number}.png" for number in range(4)])
    damage(tmp_path / "1.png")
    assert list(count(saved, tmp_path, tmp_path / "counts.npz"))[-1]["tokens"] == 16 * 39


def test_positions_are_those_of_the_bridge_of_a_run(folder, tmp_path):
    trained_workdir(tmp_path / "run")
    last = list(count(tmp_path / "run", folder, tmp_path / "counts.npz"))[-1]
    assert 0 <= last["positions/usage_min"] <= last["usage"]


def test_a_quantizer_without_such_a_table_is_refused(folder, tmp_path):
    net = TokenizerNet(FSQuantizer(levels=(4, 4, 4)), **NETWORK)
    Tokenizer(SavedTokenizer(net, random_params(net))).save_pretrained(tmp_path / "saved")
    with pytest.raises(InputError, match="has no single table of which the nearest row is the code"):
        next(count(tmp_path / "saved", folder, tmp_path / "counts.npz"))
