import functools
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import fvq_jax
from fvq_jax.inference import tokenizer as module
from fvq_jax.inference.saved import SavedTokenizer
from fvq_jax.inference.tokenizer import MAX_PER_DEVICE, Tokenizer
from fvq_jax.models.quantizers import make_quantizer
from fvq_jax.models.tokenizer import TokenizerNet
from fvq_jax.runtime.errors import InputError
from tests.helpers.golden_case import load_case, relative_error
from tests.helpers.random_tokenizer import NETWORK, random_params, random_tokenizer, tiny_net
from tests.helpers.slow_cases import slow


@functools.cache
def tokenizer(**options):
    return Tokenizer(random_tokenizer(**{"bridge": "XS/2", **options}))


def pictures(n, height=16, width=16, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, height, width, 3), dtype=np.uint8)


def direct_codes(tok, images):
    """The network as it was trained, bridge and all."""
    images = images.astype(np.float32) / 127.5 - 1
    return jax.jit(functools.partial(tok.trained_net.apply, method="encode"))({"params": tok.trained_params}, images)


def test_the_package_is_light_until_the_tokenizer_is_used():
    program = "import sys, fvq_jax; assert 'jax' not in sys.modules; fvq_jax.Tokenizer; assert 'jax' in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
    assert fvq_jax.Tokenizer is Tokenizer
    with pytest.raises(AttributeError, match="no attribute 'Tokeniser'"):
        _ = fvq_jax.Tokeniser


@pytest.mark.parametrize("options", [{}, *slow({"bridge": "none", "l2_normalize": True})])
def test_codes_and_pictures_are_those_of_the_network(options):
    tok = tokenizer(**options)
    images = pictures(5, 16, 24)
    codes = tok.encode(images)
    assert codes.shape == (5, 8, 12)
    assert codes.dtype == np.int32
    assert len(np.unique(codes)) > 8
    np.testing.assert_array_equal(codes, direct_codes(tok, images))
    np.testing.assert_array_equal(codes, tok.encode(images.astype(np.float32) / 127.5 - 1))
    decoded = tok.decode(codes)
    assert decoded.shape == images.shape
    assert decoded.dtype == np.float32
    decode = jax.jit(functools.partial(tok.trained_net.apply, method="decode"))
    raw = decode({"params": tok.trained_params}, jnp.asarray(codes))
    assert np.abs(raw).max() > 1
    np.testing.assert_allclose(decoded, np.clip(raw, -1, 1), atol=2e-5)


@pytest.mark.parametrize("options", [{}, *slow({"bridge": "none", "l2_normalize": True})])
def test_reconstruction_says_how_far_latents_are_from_their_vectors(options):
    tok, images = tokenizer(**options), pictures(5, 16, 24)
    found = tok.reconstruct(images)
    np.testing.assert_array_equal(found.codes, tok.encode(images))
    np.testing.assert_allclose(found.images, tok.decode(found.codes), atol=2e-5)
    encode = jax.jit(functools.partial(tok.net.apply, method="encode_latent"))
    z = np.asarray(encode({"params": tok.params}, images / np.float32(127.5) - 1), np.float64)
    z = z / np.linalg.norm(z, axis=-1, keepdims=True) if options else z
    apart = ((z - tok.codebook[found.codes]) ** 2).sum(axis=-1)
    np.testing.assert_allclose(found.error, apart.mean(axis=(1, 2)), rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(found.power, (z**2).sum(axis=-1).mean(axis=(1, 2)), rtol=1e-4)


def test_without_levels_there_is_only_one_to_decode():
    tok = tokenizer()
    codes = tok.encode(pictures(1))
    np.testing.assert_array_equal(tok.decode(codes, upto=1), tok.decode(codes))
    with pytest.raises(InputError, match=r"upto must be in 1..1, the number of levels, not 2"):
        tok.decode(codes, upto=2)


@pytest.mark.parametrize("options", [{}, *slow({"bridge": "none", "l2_normalize": True})])
def test_the_codebook_is_the_table_that_is_searched(options):
    tok = tokenizer(**options)
    table = jax.jit(functools.partial(tok.trained_net.apply, method="table"))({"params": tok.trained_params})
    assert tok.codebook.shape == (64, 8)
    np.testing.assert_allclose(tok.codebook, table, atol=1e-6)
    assert np.allclose(np.linalg.norm(tok.codebook, axis=1), 1, atol=1e-5) == bool(options)


def test_any_batch_size_on_all_devices_with_few_programs():
    tok = Tokenizer(random_tokenizer(ch_mult=(1,), bridge="none"))
    images = pictures(300, 8, 8)
    expected = direct_codes(tok, images)
    for n in (0, 1, 3, 8, 9, 16, 17):
        np.testing.assert_array_equal(tok.encode(images[:n]), expected[:n], strict=True)
    assert tok._encode._cache_size() == 3  # 1, 2 and 4 images per device
    assert len(images) > 2 * MAX_PER_DEVICE * jax.local_device_count()
    np.testing.assert_array_equal(tok.encode(images), expected)
    assert tok._encode._cache_size() == 5  # 16 per device, and 8 for the 44 images that are left
    np.testing.assert_array_equal(tok.encode(images), expected)
    assert tok._encode._cache_size() == 5
    assert tok.decode(tok.encode(images[:0])).shape == (0, 8, 8, 3)


def test_the_batch_is_spread_over_the_devices():
    tok = tokenizer()
    assert {leaf.sharding.num_devices for leaf in jax.tree.leaves(tok._on_devices)} == {8}
    rows = jax.device_put(pictures(8), tok._by_rows)
    codes = tok._encode(tok._on_devices, rows)
    assert [shard.data.shape[0] for shard in codes.addressable_shards] == [1] * 8


def test_its_programs_are_compiled_with_the_options_of_the_devices(monkeypatch):
    monkeypatch.setattr(module, "compiler_options", lambda mesh: {"no_such_option": mesh.size})
    tok = Tokenizer(random_tokenizer(ch_mult=(1,), bridge="none"))
    for program, rows in ((tok.encode, pictures(1)), (tok.decode, np.zeros((1, 16, 16), np.int32))):
        with pytest.raises(jax.errors.JaxRuntimeError, match="no_such_option"):
            program(rows)


def test_pickled_it_gives_the_same_codes_and_pictures():
    tok, images = tokenizer(), pictures(3)
    other = pickle.loads(pickle.dumps(tok))
    np.testing.assert_array_equal(other.encode(images), tok.encode(images))
    np.testing.assert_array_equal(other.decode(tok.encode(images)), tok.decode(tok.encode(images)))
    assert other.fingerprint == tok.fingerprint


@pytest.mark.parametrize(
    ("name", "layout", "bridge"),
    [("out", None, "XS/2"), ("out.safetensors", "llamagen", "none"), ("out.safetensors", "fvq", "XS/2")],
)
@pytest.mark.parametrize("l2_normalize", [False, *slow(True)])
def test_saved_and_loaded_it_gives_the_same_codes_and_pictures(name, layout, bridge, l2_normalize, tmp_path):
    tok = tokenizer(l2_normalize=l2_normalize)
    tok.save_pretrained(tmp_path / name, layout)
    back = Tokenizer.from_pretrained(tmp_path / name)
    assert back.trained_net == tok.trained_net.clone(quantizer=tok.trained_net.quantizer.clone(bridge=bridge))
    images = pictures(3)
    np.testing.assert_array_equal(back.encode(images), tok.encode(images))
    np.testing.assert_allclose(back.decode(tok.encode(images)), tok.decode(tok.encode(images)), atol=1e-6)
    np.testing.assert_allclose(back.codebook, tok.codebook, atol=1e-6)
    assert str(64) in repr(back)


def test_llamagen_always_works_and_fvq_says_what_it_cannot_hold(tmp_path):
    for options in ({"bridge_groups": "1d"}, {"bridge": "mlp5"}):
        tok = tokenizer(**options)
        with pytest.raises(InputError, match=r'layout "fvq".*use layout="llamagen"'):
            tok.save_pretrained(tmp_path / "x.safetensors", layout="fvq")
        tok.save_pretrained(tmp_path / "x.safetensors", layout="llamagen")
        tensors = safetensors.numpy.load_file(tmp_path / "x.safetensors")
        np.testing.assert_array_equal(tensors["quantize.embedding.weight"], tok.codebook)
        np.testing.assert_array_equal(tensors["quantize.codebook_used"], np.zeros(65536, np.float32), strict=True)
        assert not [key for key in tensors if "bridge" in key]


def test_layout_and_path_must_agree(tmp_path):
    tok = tokenizer()
    with pytest.raises(InputError, match="unknown layout 'pytorch': use layout='llamagen' or layout='fvq' or"):
        tok.save_pretrained(tmp_path / "x.pt", layout="pytorch")
    with pytest.raises(InputError, match=r"without a layout a folder is written, and .*x\.pt is a file"):
        tok.save_pretrained(tmp_path / "x.pt")
    with pytest.raises(InputError, match="must end in one of"):
        tok.save_pretrained(tmp_path / "folder", layout="fvq")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("case", ["fvq_vit", *slow("fvq_dit"), "llamagen_l2"])
def test_exported_checkpoints_load_strictly_into_an_independent_pytorch_module(case, tmp_path):
    """Both layouts, strict=True, and that module reconstructs the same pictures."""
    torch = pytest.importorskip("torch")
    from tests.helpers import torch_reference

    case = load_case(case)
    safetensors.numpy.save_file(case.weights, tmp_path / "in.safetensors")
    tok = Tokenizer.from_pretrained(tmp_path / "in.safetensors", l2_norm=case.config["l2_norm"])
    images = np.asarray(case.images())[:1]
    codes = tok.encode(images)
    np.testing.assert_array_equal(codes.reshape(1, -1), case.outputs["indices"][:1])
    reconstruction = np.moveaxis(tok.decode(codes), -1, 1)
    expected = np.clip(case.outputs["reconstruction"][:1], -1, 1)
    assert relative_error(reconstruction, expected) < 1e-4
    for layout, config in (("llamagen", {**case.config, "bridge": "none"}), ("fvq", case.config)):
        tok.save_pretrained(tmp_path / "out.pt", layout=layout)
        tok.save_pretrained(tmp_path / "out.safetensors", layout=layout)
        weights = torch.load(tmp_path / "out.pt", weights_only=True)["model"]
        module = torch_reference.Tokenizer(config)
        module.load_state_dict(weights, strict=True)
        bare = safetensors.numpy.load_file(tmp_path / "out.safetensors")
        module.load_state_dict({key: torch.from_numpy(value) for key, value in bare.items()}, strict=True)
        with torch.no_grad():
            output = module(torch.from_numpy(np.ascontiguousarray(np.moveaxis(images, -1, 1))))
        np.testing.assert_array_equal(output.indices, codes.reshape(1, -1))
        assert relative_error(output.reconstruction.clip(-1, 1), reconstruction) < 1e-4
        assert weights["quantize.codebook_used"].shape == (65536,)


def test_exported_names_and_shapes_are_those_of_llamagen(tmp_path):
    case, folded = load_case("fvq_vit"), load_case("fvq_vit_folded")
    safetensors.numpy.save_file(case.weights, tmp_path / "in.safetensors")
    Tokenizer.from_pretrained(tmp_path / "in.safetensors").save_pretrained(tmp_path / "o.safetensors", "llamagen")
    tensors = safetensors.numpy.load_file(tmp_path / "o.safetensors")
    assert {key: value.shape for key, value in tensors.items()} == folded.shapes


LEVELS = [
    pytest.param(
        {"name": "residual", "depth": 3},
        (4, 4, 3),
        r"codes must be \[b, h, w, 3\], not \[1, 4, 4\]",
        marks=pytest.mark.slow,
    ),
    (
        {"name": "residual", "depth": 2, "shared_codebook": False},
        (4, 4, 2),
        r"codes must be \[b, h, w, 2\], not \[1, 4, 4\]",
    ),
    ({"name": "multi_scale", "scales": (1, 2, 4), "phi_count": 3}, (21,), r"codes must be \[b, 21\], not \[1, 4, 4\]"),
]


@pytest.mark.parametrize(("settings", "shape", "message"), LEVELS)
def test_a_tokenizer_with_levels_is_used_and_saved_like_any_other(tmp_path, settings, shape, message):
    sizes = {"codebook_size": 64, "code_dim": 8, "bridge": "linear"}
    net = TokenizerNet(make_quantizer({**settings, **sizes}), **NETWORK)
    tok, images = Tokenizer(SavedTokenizer(net, random_params(net))), pictures(3, 8, 8)
    codes = tok.encode(images)
    assert codes.shape == (3, *shape)
    assert len(np.unique(codes)) > 8
    np.testing.assert_array_equal(codes, direct_codes(tok, images))
    assert tok.decode(codes).shape == images.shape
    assert tok.encode(images[:0]).shape == (0, *shape)
    assert tok.decode(codes[:0]).shape == (0, 8, 8, 3)
    with pytest.raises(InputError, match=message):
        tok.decode(np.zeros((1, 4, 4), np.int32))
    tok.save_pretrained(tmp_path / "saved")
    again = Tokenizer.from_pretrained(tmp_path / "saved")
    np.testing.assert_array_equal(again.encode(images), codes)
    np.testing.assert_array_equal(again.decode(codes), tok.decode(codes))


def test_multi_scale_takes_images_of_one_size():
    sizes = {"codebook_size": 64, "code_dim": 8, "bridge": "none"}
    net = TokenizerNet(make_quantizer({**LEVELS[-1][0], **sizes}), **NETWORK)
    with pytest.raises(InputError, match="takes images of 8 x 8 pixels only, not of 16 x 16"):
        Tokenizer(SavedTokenizer(net, random_params(net))).encode(pictures(1, 16, 16))


@pytest.mark.parametrize(("ch", "side", "most"), [(32, 32, 16), (32, 512, 8), (128, 1024, 1), (128, 8192, 1)])
def test_fewer_large_images_go_through_at_once(ch, side, most):
    tok = Tokenizer.__new__(Tokenizer)  # without the weights
    tok.net = tiny_net(ch=ch, ch_mult=(1, 1, 2))
    assert tok.images_at_once(side, side) == most


def test_large_images_in_small_parts_give_the_same(monkeypatch):
    tok, images = tokenizer(), pictures(2 * jax.local_device_count())
    whole = tok.reconstruct(images)
    monkeypatch.setattr(module, "BUDGET", 1)
    assert tok.images_at_once(16, 16) == 1
    np.testing.assert_array_equal(tok.encode(images), whole.codes)
    np.testing.assert_allclose(tok.decode(whole.codes), whole.images, atol=1e-5)
