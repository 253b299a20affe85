import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import fvq_jax
from fvq_jax.runtime.errors import InputError
from tests.helpers.golden_case import load_case, relative_error

CASES = {
    "rq": {"name": "residual", "depth": 4},
    "var_multiscale": {"name": "multi_scale", "scales": (1, 2, 3, 4, 6, 8)},
}


def write(path, tensors):
    safetensors.numpy.save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, path)
    return path


@functools.cache
def small(seed=0):
    """A book of 16 codes of dimension 4, and latents near some of them."""
    rng = np.random.default_rng(seed)
    book = rng.normal(size=(16, 4)).astype(np.float32)
    return book, (book[rng.integers(16, size=(1, 2, 3))] + 0.1 * rng.normal(size=(1, 2, 3, 4))).astype(np.float32)


@pytest.mark.parametrize("case_name", CASES)
def test_the_published_numbers_come_out(case_name, tmp_path):
    case = load_case(case_name)
    quantize = fvq_jax.load_quantizer(write(tmp_path / "x.safetensors", case.weights), **CASES[case_name])
    z = case.images("z")

    @jax.jit
    def total(z):
        found = quantize(z)
        losses = found.losses["codebook"] + case.config["commit_loss_beta"] * found.losses["commitment"]
        return jnp.mean(jnp.square(found.vectors)) + losses, found

    gradient, found = jax.grad(total, has_aux=True)(z)
    codes = case.outputs["codes" if "codes" in case.outputs else "indices"]
    np.testing.assert_array_equal(np.asarray(found.codes).reshape(codes.shape), codes)
    assert relative_error(np.moveaxis(np.asarray(found.vectors), -1, 1), case.outputs["quantized"]) < 1e-4
    np.testing.assert_allclose(found.losses["codebook"], case.outputs["vq_loss"], rtol=1e-4)
    commitment = case.config["commit_loss_beta"] * found.losses["commitment"]
    np.testing.assert_allclose(commitment, case.outputs["commit_loss"], rtol=1e-4)
    assert relative_error(np.moveaxis(np.asarray(gradient), -1, 1), case.outputs["grad_z"]) < 1e-3
    np.testing.assert_allclose(quantize.decode(found.codes), found.vectors, atol=1e-5)


@pytest.mark.parametrize("prefix", ["", "quantize.", "model.quantize.", "state_dict.module.quantize."])
def test_prefixes_and_the_rest_of_a_tokenizer_do_not_matter(prefix, tmp_path):
    book, latents = small()
    tensors = {f"{prefix}embedding.weight": book} | ({"model.encoder.conv_in.bias": book} if prefix else {})
    quantize = fvq_jax.load_quantizer(write(tmp_path / "x.safetensors", tensors), "vector")
    distance = np.square(latents[..., None, :] - book).sum(-1)
    np.testing.assert_array_equal(quantize(latents).codes, distance.argmin(-1))


def test_a_moving_average_is_preferred(tmp_path):
    book, latents = small()
    tensors = {"state_dict.quantize.embedding.weight": book + 1, "state_dict.model_ema.quantizeembeddingweight": book}
    found = fvq_jax.load_quantizer(write(tmp_path / "x.safetensors", tensors), "ibq")(latents)
    np.testing.assert_array_equal(found.codes, (latents @ book.T).argmax(-1))


def test_settings_that_tensors_do_not_tell_are_heeded(tmp_path):
    book, latents = small()
    path = write(tmp_path / "x.safetensors", {"embedding.weight": book})
    assert fvq_jax.load_quantizer(path, "residual", depth=3)(latents).codes.shape == (1, 2, 3, 3)
    unit = fvq_jax.load_quantizer(path, "vector", l2_normalize=True)(latents).vectors
    np.testing.assert_allclose(np.linalg.norm(unit, axis=-1), 1, rtol=1e-5)
    codes = fvq_jax.load_quantizer(path, "ibq")(latents).codes
    np.testing.assert_array_equal(codes, (latents @ book.T).argmax(-1))
    upto = fvq_jax.load_quantizer(path, "residual", depth=2)
    codes = upto(latents).codes
    np.testing.assert_allclose(upto.decode(codes, 1), book[np.asarray(codes)[..., 0]])


def test_pickled_it_quantizes_the_same(tmp_path):
    book, latents = small()
    quantize = fvq_jax.load_quantizer(write(tmp_path / "x.safetensors", {"embedding.weight": book}), "vector")
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(quantize))(latents).codes, quantize(latents).codes)


@pytest.mark.parametrize("shared", [True, False])
def test_convolutions_may_be_shared_by_all_scales_or_none(shared, tmp_path):
    book, latents = small()
    rng, count = np.random.default_rng(3), 1 if shared else 2
    phi = [{"weight": rng.normal(size=(4, 4, 3, 3)), "bias": rng.normal(size=4)} for _ in range(count)]
    found = []
    for form in ("quant_resi.qresi_ls.{}.", "quant_resi.qresi." if shared else "quant_resi.{}."):
        tensors = {form.format(i) + leaf: np.float32(value) for i, one in enumerate(phi) for leaf, value in one.items()}
        path = write(tmp_path / "x.safetensors", {"embedding.weight": book, **tensors})
        quantize = fvq_jax.load_quantizer(path, "multi_scale", scales=(1, 2))
        found.append(quantize(latents[:, :2, :2]))
        assert quantize.quantizer.phi_count == count
    np.testing.assert_array_equal(found[0].vectors, found[1].vectors)


def test_the_books_of_rq_vae_say_how_many_levels_there_are(tmp_path):
    book, latents = small()
    padded = np.concatenate([book, np.zeros((1, 4), np.float32)])
    tensors = {f"quantizer.codebooks.{level}.weight": padded for level in range(3)}
    tensors |= {f"quantizer.codebooks.{level}.embed_ema": book + 1 for level in range(3)}
    found = fvq_jax.load_quantizer(write(tmp_path / "x.safetensors", tensors), "residual")
    plain = fvq_jax.load_quantizer(write(tmp_path / "y.safetensors", {"embedding.weight": book}), "residual", depth=3)
    np.testing.assert_array_equal(found(latents).codes, plain(latents).codes)
    tensors["quantizer.codebooks.2.weight"] = np.concatenate([book + 1, padded[-1:]])
    found = fvq_jax.load_quantizer(write(tmp_path / "z.safetensors", tensors), "residual")
    assert not found.quantizer.shared_codebook
    own = np.asarray(found(latents).codes)
    np.testing.assert_array_equal(own % 3, np.broadcast_to(np.arange(3), own.shape))
    np.testing.assert_array_equal(own[..., :2] // 3, plain(latents).codes[..., :2])
    with pytest.raises(InputError, match="is number 3 j \\+ l: multiply by 3, and add the level"):
        found.decode(own // 3)
    np.testing.assert_allclose(found.decode(own), found(latents).vectors, atol=1e-6)
    path = tmp_path / "z.safetensors"
    two = fvq_jax.load_quantizer(path, "residual", depth=2)
    np.testing.assert_array_equal(two(latents).codes // 2, own[..., :2] // 3)
    one = fvq_jax.load_quantizer(path, "residual", depth=1)
    np.testing.assert_array_equal(one(latents).codes, own[..., :1] // 3)
    with pytest.raises(InputError, match="has 3 levels with a codebook each, so depth cannot be 5"):
        fvq_jax.load_quantizer(path, "residual", depth=5)
    with pytest.raises(InputError, match="has a codebook for every level: shared_codebook must be False"):
        fvq_jax.load_quantizer(path, "residual", shared_codebook=True)
    with pytest.raises(InputError, match="has one codebook for all levels: shared_codebook must be True"):
        fvq_jax.load_quantizer(tmp_path / "x.safetensors", "residual", shared_codebook=False)
    shorter = tensors | {"quantizer.codebooks.1.weight": padded[1:]}
    with pytest.raises(InputError, match=r"codebooks\.1\.weight is \[\d+, 4\], and codebooks\.0\.weight is \["):
        fvq_jax.load_quantizer(write(tmp_path / "v.safetensors", shorter), "residual")
    del tensors["quantizer.codebooks.1.weight"]
    with pytest.raises(InputError, match=r"lacks codebooks\.1\.weight, and has 2"):
        fvq_jax.load_quantizer(write(tmp_path / "w.safetensors", tensors), "residual")


def test_quantizers_that_keep_state_are_read(tmp_path):
    book, latents = small()
    layer = np.random.default_rng(2).normal(size=(4, 4)).astype(np.float32)
    tensors = {"embedding.weight": book, "embedding_proj.weight": layer, "embedding_proj.bias": layer[0]}
    found = fvq_jax.load_quantizer(write(tmp_path / "x.safetensors", tensors), "simvq")(latents)
    table = book @ layer.T + layer[0]
    distance = np.square(latents[..., None, :] - table).sum(-1)
    np.testing.assert_array_equal(found.codes, distance.argmin(-1))
    tensors = {"embedding.weight": book, "embedding.cluster_size": book[:, 0], "embedding.embed_avg": book}
    found = fvq_jax.load_quantizer(write(tmp_path / "y.safetensors", tensors), "ema")(latents)
    np.testing.assert_allclose(found.vectors, book[np.asarray(found.codes)])
    assert set(found.losses) == {"commitment"}


def test_bad_files_settings_and_latents_are_refused_in_one_line(tmp_path):
    book, latents = small()
    path = write(tmp_path / "x.safetensors", {"embedding.weight": book, "embedding.extra": book})
    for name, settings, message in (
        ("vector", {}, r"x\.safetensors does not hold this vector quantizer: 1 tensor extra: embedding\.extra"),
        ("fancy", {}, "there is no quantizer 'fancy': use one of vector, residual"),
        ("vector", {"depth": 4}, "the quantizer vector has no setting depth: it takes name, codebook_size"),
        ("lfq", {"bits": 4}, "the quantizer lfq has no tensors"),
        ("residual", {"depth": 0}, "depth must be above 0"),
        ("vector", {"estimator": "fancy"}, "estimator must be one of straight_through"),
        ("multi_scale", {"scales": 3}, "scales must be numbers such as"),
    ):
        with pytest.raises(InputError, match=message):
            fvq_jax.load_quantizer(path, name, **settings)
    var = write(tmp_path / "var.safetensors", load_case("var_multiscale").weights)
    with pytest.raises(InputError, match=r"has 6 scales, and 1 2 3 4 5 6 8 10 13 16 are 10: give scales="):
        fvq_jax.load_quantizer(var, "multi_scale")
    with pytest.raises(InputError, match="growing positive whole numbers"):
        fvq_jax.load_quantizer(var, "multi_scale", scales=(8, 6, 4, 3, 2, 1))
    quantize = fvq_jax.load_quantizer(write(tmp_path / "y.safetensors", {"embedding.weight": book}), "vector")
    with pytest.raises(InputError, match="do not hold age, which the quantizer vector has with these settings"):
        fvq_jax.load_quantizer(tmp_path / "y.safetensors", "vector", region_window=5)
    for wrong in (latents[0], latents[..., :3], latents.astype(int)):
        with pytest.raises(InputError, match=r"latents must be floating-point \[b, h, w, 4\], not "):
            quantize(wrong)
