import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fvq_jax.interop.layouts.fvq import FVQ
from fvq_jax.runtime.errors import InputError
from tests.helpers.golden64 import published_net
from tests.helpers.golden_case import load_case, relative_error

# More levels, more blocks and other bridges than the golden cases have.
CONFIGS = {
    "vit": {"bridge": "vit:QBridge-XS/2", "ch_mult": [1, 2, 1, 2], "num_res_blocks": 2},
    "linear": {"bridge": "linear", "ch_mult": [2, 1], "num_res_blocks": 1},
    "l2": {"bridge": "none", "ch_mult": [1], "num_res_blocks": 1, "l2_norm": True},
}
COMMON = {"ch": 32, "z_channels": 16, "codebook_size": 64, "codebook_dim": 8, "l2_norm": False}
LOSSES = {"commit_loss_beta": 0.25, "entropy_loss_ratio": 0.0, "entropy_temperature": 0.01}


def shapes_of(tree):
    return jax.tree.map(lambda leaf: leaf.shape, tree)


@pytest.mark.parametrize("name", ["fvq_vit", "fvq_dit", "fvq_linear", "llamagen_l2", "fvq_vit_folded"])
def test_a_published_checkpoint_fills_exactly_our_tree(name):
    case = load_case(name)
    config = case.config or {**load_case("fvq_vit").config, "bridge": "none"}
    tensors = {key: np.full(shape, i, np.float32) for i, (key, shape) in enumerate(case.shapes.items())}
    params = FVQ.params(tensors, published_net(config), "x.pt")
    expected = jax.eval_shape(published_net(config).init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
    assert shapes_of(params) == shapes_of(expected)
    # Every tensor but the usage buffer arrived, each in a place of its own.
    values = {float(leaf.flat[0]) for leaf in jax.tree.leaves(params)}
    numbers = {key: i for i, key in enumerate(tensors)}
    assert values == set(numbers.values()) - {numbers["quantize.codebook_used"]}


@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_equal_those_of_an_independent_module(name):
    torch = pytest.importorskip("torch")
    from tests.helpers.torch_reference import Tokenizer

    config = COMMON | LOSSES | CONFIGS[name]
    torch.manual_seed(0)
    module = Tokenizer(config)
    images = np.random.default_rng(0).uniform(-1, 1, (2, 3, 16, 16)).astype(np.float32)
    with torch.no_grad():
        module.quantize.embedding.weight.mul_(0.3)
        expected = module(torch.from_numpy(images))
    net = published_net(config)
    params = FVQ.params({key: value.numpy() for key, value in module.state_dict().items()}, net, "x.pt")
    output = jax.jit(net.apply)({"params": params}, np.moveaxis(images, 1, -1))
    assert len(np.unique(expected.indices)) > 2
    np.testing.assert_array_equal(output.quantized.codes.reshape(2, -1), expected.indices)
    reconstruction = np.moveaxis(np.asarray(output.reconstruction), -1, 1)
    assert relative_error(reconstruction, expected.reconstruction) < 1e-4
    np.testing.assert_allclose(output.quantized.losses["codebook"], expected.vq, rtol=1e-5)
    np.testing.assert_allclose(output.quantized.losses["commitment"], expected.commit, rtol=1e-5)


@pytest.mark.parametrize(
    "key",
    [
        "loss.discriminator.main.0.weight",
        "encoder.conv_blocks.0.res.0.norm3.weight",
        "encoder.mid.3.norm1.weight",
        "decoder.conv_blocks.1.up.conv.weight",
        "quantize.qbridge.blocks.0.attn.rel_pos.weight",
        "quantize.embedding_proj.weight",
    ],
)
def test_a_tensor_of_another_model_is_refused(key):
    case = load_case("llamagen_l2")
    tensors = {**case.weights, key: np.zeros((3, 3), np.float32)}
    with pytest.raises(InputError, match=key):
        FVQ.params(tensors, published_net(case.config), "x.pt")


def test_the_decoder_counts_its_levels_from_the_lowest():
    names = {
        "encoder/level0_res1/conv1/conv/kernel": "encoder.conv_blocks.0.res.1.conv1.weight",
        "decoder/level3_res1/norm1/norm/scale": "decoder.conv_blocks.0.res.1.norm1.weight",
        "decoder/level3_upsample/conv/conv/bias": "decoder.conv_blocks.0.upsample.conv.bias",
    }
    assert {path: FVQ.name_of(path, levels=4) for path in names} == names
