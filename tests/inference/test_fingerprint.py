"""What says which codes come out of a tokenizer, wherever it was loaded from."""

import re
import zipfile

import jax
import numpy as np
import pytest

from fvq_jax.inference.saved import SavedTokenizer
from fvq_jax.inference.tokenizer import Tokenizer
from fvq_jax.models.quantizers.multi_scale import MultiScaleQuantizer
from fvq_jax.models.quantizers.residual import ResidualQuantizer
from tests.helpers.golden_case import GOLDEN
from tests.helpers.random_tokenizer import random_tokenizer
from tests.helpers.slow_cases import slow


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    with zipfile.ZipFile(GOLDEN / "written_at_0a70d9e.zip") as archive:
        archive.extractall(folder)
    return folder / "workdir"


@pytest.mark.parametrize("source", ["workdir", *slow("random")])
def test_it_is_the_same_from_every_form_in_which_a_tokenizer_is_saved(source, workdir, tmp_path):
    if source == "workdir":
        tok = Tokenizer.from_pretrained(workdir)
    else:
        tok = Tokenizer(random_tokenizer(bridge="XS/2-d1", l2_normalize=True))
    assert re.fullmatch("[0-9a-f]{16}", tok.fingerprint)
    assert tok.trained_net.quantizer.foldable  # there is a bridge
    tok.save_pretrained(tmp_path / "native")
    assert Tokenizer.from_pretrained(tmp_path / "native").fingerprint == tok.fingerprint
    (tmp_path / "native" / "bridge.safetensors").unlink()
    assert Tokenizer.from_pretrained(tmp_path / "native").fingerprint == tok.fingerprint
    unit_length = tok.trained_net.quantizer.l2_normalize
    for layout in ("llamagen", "fvq"):
        for ending in ("pt", "safetensors"):
            path = tmp_path / f"{layout}.{ending}"
            tok.save_pretrained(path, layout)
            given = {"l2_norm": unit_length} if ending == "safetensors" else {}
            assert Tokenizer.from_pretrained(path, **given).fingerprint == tok.fingerprint


def changed(saved, *parts):
    """Other weights in these parts of the network."""
    params = {
        name: jax.tree.map(lambda leaf: leaf + np.float32(0.001), tree) if name in parts else tree
        for name, tree in saved.params.items()
    }
    return Tokenizer(SavedTokenizer(saved.net, params)).fingerprint


def test_it_changes_with_what_decides_the_codes_and_not_with_the_decoder():
    saved = random_tokenizer()
    own = Tokenizer(saved).fingerprint
    assert changed(saved) == changed(saved, "decoder", "post_quant_conv") == own
    assert changed(saved, "quantizer") == own  # so it says
    others = [changed(saved, "encoder"), changed(saved, "quant_conv"), Tokenizer(random_tokenizer(1)).fingerprint]
    others.append(Tokenizer(random_tokenizer(l2_normalize=True)).fingerprint)
    others.append(Tokenizer(random_tokenizer(codebook_size=32)).fingerprint)
    assert len({own, *others}) == 6


def test_it_tells_quantizers_of_one_kind_apart_by_what_decides_their_codes():
    saved = random_tokenizer()

    def fingerprint(quantizer):
        return Tokenizer(SavedTokenizer(saved.net.clone(quantizer=quantizer), saved.params)).fingerprint

    plain = {"codebook_size": 64, "code_dim": 8, "bridge": "none"}
    found = [
        fingerprint(quantizer)
        for quantizer in (
            saved.net.quantizer,
            ResidualQuantizer(**plain, depth=2),
            ResidualQuantizer(**plain, depth=3),
            ResidualQuantizer(**plain, depth=2, shared_codebook=False),
            MultiScaleQuantizer(**plain, scales=(1, 2), phi_count=1),
            MultiScaleQuantizer(**plain, scales=(1, 3), phi_count=1),
        )
    ]
    assert len(set(found)) == len(found)
    assert fingerprint(ResidualQuantizer(**plain, depth=2, estimator="rotation")) == found[1]
