import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fvq_jax.config.checks import validate
from fvq_jax.models.quantizers.multi_scale import MultiScaleQuantizer, phi_of_scales
from fvq_jax.runtime.errors import InputError
from fvq_jax.tasks.tokenizer.fields import use_quantizer
from fvq_jax.tasks.tokenizer.task import TokenizerTask
from tests.helpers.tiny import tiny_config

K, D, SCALES, SIDE = 40, 4, (1, 2, 3, 5), 5


def make(**options):
    settings = {"codebook_size": K, "code_dim": D, "bridge": "none", "scales": SCALES, "phi_count": 2, **options}
    return MultiScaleQuantizer(**settings)


@functools.cache
def case():
    """Latents [2, 5, 5, d], and parameters with codes of many lengths."""
    rng = np.random.default_rng(1)
    params = {
        f"phi_{i}": {"conv": {"kernel": rng.normal(size=(3, 3, D, D)) / 6, "bias": 0.1 * rng.normal(size=D)}}
        for i in range(4)
    }
    params["codebook"] = rng.normal(size=(K, D)) * np.geomspace(0.2, 1.5, K)[:, None]
    return jax.tree.map(jnp.float32, (rng.normal(size=(2, SIDE, SIDE, D)), params))


# --- an oracle in float64, one number at a time ---------------------------------------------------------------------


def area(x, size):
    """The mean over the rows and columns that each bin touches."""
    edges = [(i * SIDE // size, math.ceil((i + 1) * SIDE / size)) for i in range(size)]
    return np.array([[x[a:b, c:d].mean(axis=(0, 1)) for c, d in edges] for a, b in edges])


def cubic(t):
    t = abs(t)
    if t <= 1:
        return 1.25 * t**3 - 2.25 * t**2 + 1
    return -0.75 * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0


def bicubic(x):
    size = len(x)
    out = np.zeros((SIDE, SIDE, D))
    for i in range(SIDE):
        for j in range(SIDE):
            y, z = ((n + 0.5) * size / SIDE - 0.5 for n in (i, j))
            for a in range(math.floor(y) - 1, math.floor(y) + 3):
                for b in range(math.floor(z) - 1, math.floor(z) + 3):
                    pixel = x[min(max(a, 0), size - 1), min(max(b, 0), size - 1)]
                    out[i, j] += cubic(y - a) * cubic(z - b) * pixel
    return out


def blend(x, phi):
    out, framed = np.zeros_like(x), np.pad(x, ((1, 1), (1, 1), (0, 0)))
    for i in range(SIDE):
        for j in range(SIDE):
            window = framed[i : i + 3, j : j + 3]
            out[i, j] = 0.5 * x[i, j] + 0.5 * (np.einsum("yxc,yxcf->f", window, phi["kernel"]) + phi["bias"])
    return out


@functools.cache
def oracle(phis=(0, 0, 1, 1)):
    """Codes [b, 39] and the sums of the first scales [scales, b, 5, 5, d]."""
    latent, params = jax.tree.map(np.float64, case())
    table, codes, sums = params["codebook"], [], []
    for z in latent:
        total, flat, of_image = np.zeros_like(z), [], []
        for size, phi in zip(SCALES, phis, strict=True):
            small = area(z - total, size).reshape(-1, D)
            chosen = np.array([np.argmin(np.linalg.norm(table - token, axis=1)) for token in small])
            total = total + blend(bicubic(table[chosen].reshape(size, size, D)), params[f"phi_{phi}"]["conv"])
            flat.append(chosen)
            of_image.append(total)
        codes.append(np.concatenate(flat))
        sums.append(of_image)
    return np.array(codes), np.swapaxes(sums, 0, 1)


def encoded(**options):
    latent, params = case()
    kept = {name: params[name] for name in ("codebook", *(f"phi_{i}" for i in range(options.get("phi_count", 2))))}
    return jax.jit(make(**options).apply)({"params": kept}, latent)


def test_each_scale_is_the_codes_nearest_to_what_is_left():
    codes, sums = oracle()
    output = encoded()
    np.testing.assert_array_equal(output.codes, codes)
    np.testing.assert_allclose(output.vectors, sums[-1], atol=1e-5)
    error = np.mean([np.mean(np.square(case()[0] - total)) for total in sums])
    np.testing.assert_allclose(list(output.losses.values()), error, rtol=1e-5)
    assert len(np.unique(codes)) > 10


@pytest.mark.parametrize("upto", [1, 3, 4, None])
def test_decoding_adds_up_the_first_scales(upto):
    codes, sums = oracle()
    decode = jax.jit(lambda params, codes: make().apply({"params": params}, codes, upto, method="decode"))
    vectors = decode(case()[1], jnp.asarray(codes, jnp.int32))
    np.testing.assert_allclose(vectors, sums[-1 if upto is None else upto - 1], atol=1e-5)


@pytest.mark.parametrize(("count", "phis"), [(1, (0, 0, 0, 0)), (4, (0, 1, 2, 3))])
def test_the_convolutions_are_shared_by_neighbouring_scales(count, phis):
    output = encoded(phi_count=count)
    np.testing.assert_array_equal(output.codes, oracle(phis)[0])
    np.testing.assert_allclose(output.vectors, oracle(phis)[1][-1], atol=1e-5)
    assert np.abs(output.vectors - oracle()[1][-1]).max() > 0.1


def test_scales_use_the_published_convolutions():
    assert phi_of_scales(10, 4) == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]
    assert phi_of_scales(6, 4) == [0, 0, 1, 2, 3, 3]
    assert phi_of_scales(6, 3) == [0, 0, 1, 1, 2, 2]
    assert phi_of_scales(1, 1) == [0]


def test_a_fresh_one_has_a_convolution_per_phi():
    made = jax.eval_shape(make(bridge="linear", phi_count=3).init, jax.random.key(0), case()[0])["params"]
    assert set(made) == {"codebook", "bridge_net", "phi_0", "phi_1", "phi_2"}


def test_the_grid_follows_from_the_shape_of_codes():
    assert make().grid((39,)) == make().only_grid == (5, 5)
    for shape in ((5, 5), (38,)):
        with pytest.raises(ValueError, match=r"codes must be \[b, 39\]"):
            make().grid(shape)


def test_it_is_described_by_its_sizes_bridge_and_scales():
    assert make().description == "bridge none, scales 1 2 3 5"
    sizes = {"codebook_size": K, "code_dim": D, "bridge": "none", "scales": SCALES, "phi_count": 2}
    assert make().architecture() == sizes
    assert make().code_shape(5, 5) == (39,)
    assert MultiScaleQuantizer().code_shape(16, 16) == (680,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scales": ()}, "scales must be growing positive whole numbers such as"),
        ({"scales": (0, 1)}, "scales must be growing positive whole numbers"),
        ({"scales": (1, 2, 2)}, "scales must be growing positive whole numbers"),
        ({"scales": (2, 1)}, "scales must be growing positive whole numbers"),
        ({"scales": (True, 2)}, "scales must be growing positive whole numbers"),
        ({"codebook_size": 64, "bridge": "dit-XS/2-c4"}, "has a table for each class: scales need a single one"),
        ({"phi_count": 5}, "phi_count 5 leaves a convolution that none of the 4 scales uses; use one of 1, 2, 3, 4$"),
        ({"scales": (1, 2, 3, 4, 5, 6, 7), "phi_count": 6}, "use one of 1, 2, 3, 4, 5, 7$"),
    ],
)
def test_settings_that_do_not_fit_are_refused_with_what_would(options, message):
    make().check(4)
    with pytest.raises(ValueError, match=message):
        make(**options).check()


@pytest.mark.parametrize("grid", [(4, 4), (5, 4), (10, 10)])
def test_another_grid_than_the_last_scale_is_refused(grid):
    message = "scales end with 5, which takes a grid of 5 x 5 latents, not {} x {}: use square images".format(*grid)
    with pytest.raises(ValueError, match=message):
        make().code_shape(*grid)
    with pytest.raises(ValueError, match=message):
        make().apply({"params": case()[1]}, jnp.zeros((1, *grid, D)), method="encode")


def test_a_config_whose_images_do_not_fit_the_scales_is_refused():
    config = tiny_config()  # 16 x 16 images, halved once
    use_quantizer(config, "multi_scale", scales=(1, 2, 4, 8), codebook_size=64, code_dim=8, bridge="none")
    validate(config, TokenizerTask, 8)
    config.tokenizer.quantizer.scales = (1, 2, 4)
    config.tokenizer.quantizer.phi_count = 3
    with pytest.raises(InputError, match=r"tokenizer.quantizer: scales end with 4, .* not 8 x 8"):
        validate(config, TokenizerTask, 8)
