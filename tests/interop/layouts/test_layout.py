import dataclasses

import jax
import numpy as np
import pytest

from fvq_jax.interop.layouts import layout_of
from fvq_jax.interop.layouts.fvq import FVQ
from fvq_jax.interop.named_tensors import abstract_params
from fvq_jax.models.quantizers.vector import VectorQuantizer
from fvq_jax.models.tokenizer import TokenizerNet
from fvq_jax.runtime.errors import InputError
from tests.helpers.golden_case import load_case


def net_with(**settings):
    quantizer = VectorQuantizer(**{"codebook_size": 64, "code_dim": 8, "bridge": "none"} | settings)
    return TokenizerNet(quantizer, ch=32, ch_mult=(1, 2, 1), num_res_blocks=2, z_channels=24)


def tensors_of(net, seed=0):
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), abstract_params(net))
    return FVQ.tensors(net, params)


def read(tensors, source="the file", **said):
    """The layout that is recognised, its network and the parameters."""
    layout = layout_of(tensors, source)
    net = layout.network(tensors, said, source)
    return layout, net, layout.params(tensors, net, source)


@pytest.mark.parametrize("bridge", ["none", "linear", "XS/2", "S/4-d1", "dit-XS/4-d3", "dit-XS/2-d1-c9"])
def test_everything_but_l2_normalize_is_read_off_the_tensors(bridge):
    net = net_with(bridge=bridge)
    tensors = tensors_of(net)
    for l2_normalize in (False, True):
        found = layout_of(tensors, "x.pt").network(tensors, {"l2_norm": l2_normalize}, "x.pt")
        expected = net_with(bridge=bridge, l2_normalize=l2_normalize)
        for field in dataclasses.fields(TokenizerNet):
            if field.name not in ("parent", "name"):
                assert getattr(found, field.name) == getattr(expected, field.name), field.name


@pytest.mark.parametrize("name", ["fvq_vit", "fvq_dit", "fvq_linear", "llamagen_l2"])
def test_there_and_back_is_bit_exact(name):
    tensors = load_case(name).weights
    layout, net, params = read(tensors)
    assert layout.name == ("llamagen" if name == "llamagen_l2" else "fvq")
    back = layout.tensors(net, params)
    assert back.keys() == tensors.keys() - {"quantize.codebook_used"}
    for key, value in back.items():
        np.testing.assert_array_equal(value, tensors[key], err_msg=key, strict=True)


def complaint(changes):
    """What is said about the `fvq_vit` checkpoint after some tensors are replaced, or with None removed."""
    tensors = load_case("fvq_vit").weights | changes
    tensors = {key: value for key, value in tensors.items() if value is not None}
    with pytest.raises(InputError) as error:
        read(tensors, "x.pt")
    message = str(error.value)
    assert "\n" not in message
    return message.removeprefix("x.pt does not hold this FVQ tokenizer: ")


def test_the_first_ten_missing_tensors_are_named_and_the_rest_counted():
    keys = [key for key in load_case("fvq_vit").weights if key.startswith("decoder.")]
    count, _, names = complaint(dict.fromkeys(keys)).partition(" missing: ")
    names, _, more = names.partition(" and ")
    assert count == f"{len(keys)} tensors"
    assert len(names.split(", ")) == 10
    assert set(names.split(", ")) <= set(keys)
    assert more == f"{len(keys) - 10} more"


@pytest.mark.parametrize(
    "key", ["encoder.conv_in.weight", "encoder.conv_blocks.2.res.0.conv1.weight", "post_quant_conv.bias"]
)
def test_a_tensor_that_shows_a_size_can_itself_be_missing_or_wrong(key):
    assert complaint({key: None}) == f"1 tensor missing: {key}"
    shape = list(load_case("fvq_vit").weights[key].shape)
    wrong = [96, *shape[1:]]
    assert complaint({key: np.zeros(wrong, np.float32)}) == (
        f"1 tensor of another shape: {key} {wrong} instead of {shape}"
    )


def test_every_kind_of_problem_is_listed():
    counts = np.zeros(32, np.int64)
    message = complaint(
        {"encoder.conv_out.bias": None, "encoder.conv_in.bias": counts, "head.a": counts, "head.b": counts}
    )
    assert message == (
        "1 tensor missing: encoder.conv_out.bias; 2 tensors extra: head.a, head.b; "
        "1 tensor not floating-point: encoder.conv_in.bias (int64)"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"quantize.embedding.weight": None},
            "x.pt is no FVQ tokenizer: it lacks quantize.embedding.weight",
        ),
        (
            {"quantize.embedding.weight": np.zeros((255, 16))},
            "x.pt has a quantizer that does.*255 codes are not a square",
        ),
        (
            {"quantize.qbridge.x_embedder.proj.weight": np.zeros((64, 16, 4, 2))},
            "patches of 4 x 2 codes are not square",
        ),
    ],
)
def test_networks_that_do_not_exist_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        raise InputError(complaint(changes))


def test_other_models_are_refused():
    with pytest.raises(InputError, match=r"^x.pt is in none of the layouts.*nor like one: .* are features.0.weight$"):
        layout_of(["features.0.weight"], "x.pt")
    width = 48
    tensors = load_case("fvq_vit").weights
    for layer in ("x_embedder.proj", "blocks.0.attn.proj"):
        tensors[f"quantize.qbridge.{layer}.bias"] = np.zeros(width, np.float32)
    with pytest.raises(InputError, match="no bridge is 48 wide"):
        read(tensors, "x.pt")
    tensors = tensors_of(net_with())
    for name in ("conv1.weight", "conv1.bias", "norm2.weight"):
        tensors[f"encoder.conv_blocks.1.res.0.{name}"] = np.zeros((40, 32, 3, 3), np.float32)
    with pytest.raises(InputError, match=r"32 channels at first and 32, 40, 32 in its levels.*multiples"):
        read(tensors, "x.pt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bridge": "XS/2", "bridge_groups": "1d"}, 'bridges over 2d patches only.*bridge_groups "1d".*llamagen'),
        ({"bridge": "mlp5"}, "no names for the bridge mlp5.*llamagen"),
    ],
)
def test_what_the_layout_cannot_hold_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        FVQ.tensors(net_with(**options), {})
