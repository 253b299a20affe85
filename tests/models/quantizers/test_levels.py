import functools
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from fvq_jax.models.quantizers import make_quantizer, quantizer_settings
from fvq_jax.models.tokenizer import TokenizerNet, fold
from fvq_jax.ops import nearest_cpu
from fvq_jax.runtime.mesh import shardings
from fvq_jax.runtime.names import flatten
from tests.helpers.compiled_program import COLLECTIVE, arrays, collectives, size
from tests.helpers.golden_case import relative_error
from tests.helpers.slow_cases import MESHES

K, D, SIDE = 48, 8, 3
KINDS = {
    "residual": {"name": "residual", "depth": 3},
    "residual of own codes": {"name": "residual", "depth": 3, "shared_codebook": False},
    "multi_scale": {"name": "multi_scale", "scales": (1, 2, SIDE), "phi_count": 2},
}
LEVELS = 3
WEIGHTS = np.random.default_rng(9).normal(size=(8, SIDE, SIDE, D)).astype(np.float32)
variants = pytest.mark.parametrize("name", KINDS)


def make(name, mesh=None, **options):
    settings = {"codebook_size": K, "code_dim": D, "bridge": "linear", **KINDS[name], **options}
    return make_quantizer(settings, mesh=mesh)


@functools.cache
def latents_and_params(name):
    """Random latents, and codes of many lengths, so that those of late levels are chosen too."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(make(name).init, jax.random.key(0), jnp.zeros((8, SIDE, SIDE, D)))["params"]
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape) * np.prod(leaf.shape[:-1]) ** -0.5, shapes)
    params["codebook"] = rng.normal(size=(K, D)) * np.geomspace(0.2, 2, K)[:, None]
    return jax.tree.map(jnp.float32, (rng.normal(size=WEIGHTS.shape), params))


def mesh_of(data, codebook):
    devices = jax.devices()[: data * codebook]
    return jax.make_mesh((data, codebook), ("data", "codebook"), (AxisType.Auto,) * 2, devices=devices)


@functools.cache
def results(name, sizes=None):
    """(output, gradients to latents and parameters) of a loss that weighs every part."""
    quantizer = make(name, None if sizes is None else mesh_of(*sizes))

    def loss(latent, params):
        output = quantizer.apply({"params": params}, latent)
        terms = {name: weight * output.losses[name] for name, weight in quantizer.loss_weights.items()}
        return sum(terms.values()) + jnp.sum(WEIGHTS * output.vectors), output

    latent, params = latents_and_params(name)
    if sizes is not None:
        latent = jax.device_put(latent, NamedSharding(quantizer.mesh, P(("data", "codebook"))))
        layout = shardings({"quantizer": params}, quantizer.mesh, quantizer.rules)["quantizer"]
        params = jax.device_put(params, layout)
    gradients, output = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(latent, params)
    return output, gradients


@functools.cache
def sums_of(name):
    """The sums of the first 1, 2, 3 levels, and the codes."""
    latent, params = latents_and_params(name)
    quantizer = make(name)

    @jax.jit
    def run(latent, params):
        codes = quantizer.apply({"params": params}, latent, method="encode")
        decode = functools.partial(quantizer.apply, {"params": params}, codes, method="decode")
        return [decode(upto) for upto in range(1, LEVELS + 1)], decode(), codes

    return run(latent, params)


@pytest.mark.parametrize("sizes", MESHES)
@variants
def test_on_a_mesh_codes_losses_and_gradients_are_those_of_one_device(name, sizes):
    expected, expected_gradients = results(name)
    output, gradients = results(name, sizes)
    np.testing.assert_array_equal(output.codes, expected.codes)
    np.testing.assert_allclose(output.vectors, expected.vectors, atol=1e-5)
    for term, loss in output.losses.items():
        np.testing.assert_allclose(loss, expected.losses[term], rtol=1e-5)
    errors = jax.tree.map(relative_error, gradients, expected_gradients)
    assert max(jax.tree.leaves(errors)) < 1e-4, errors


@pytest.mark.parametrize("batch", [1, 3])
@variants
def test_a_batch_that_the_devices_do_not_divide_gives_the_same_codes_and_vectors(name, batch):
    latent, params = latents_and_params(name)
    output = jax.jit(make(name, mesh_of(2, 4)).apply)({"params": params}, latent[:batch])
    np.testing.assert_array_equal(output.codes, results(name)[0].codes[:batch])
    np.testing.assert_allclose(output.vectors, results(name)[0].vectors[:batch], atol=1e-5)


@variants
def test_losses_are_means_over_the_sums_of_the_first_levels(name):
    latent, _ = latents_and_params(name)
    output, _ = results(name)
    sums, whole, codes = sums_of(name)
    assert list(output.losses) == ["codebook", "commitment"]
    assert codes.dtype == output.codes.dtype == jnp.int32
    assert codes.shape == (8, *make(name).code_shape(SIDE, SIDE))
    np.testing.assert_array_equal(codes, output.codes)
    np.testing.assert_allclose(whole, output.vectors, atol=1e-6)
    np.testing.assert_allclose(sums[-1], whole, atol=1e-6)
    expected = np.mean([np.mean(np.square(np.float64(latent) - total)) for total in sums])
    np.testing.assert_allclose(list(output.losses.values()), expected, rtol=1e-5)
    assert all(np.abs(after - before).max() > 0.01 for before, after in itertools.pairwise(sums))


@variants
def test_latents_get_the_straight_through_gradient_and_the_mean_pull_of_all_sums(name):
    latent, _ = latents_and_params(name)
    pull = np.mean([0.25 * 2 * (latent - total) / latent.size for total in sums_of(name)[0]], axis=0)
    np.testing.assert_allclose(results(name)[1][0], WEIGHTS + pull, atol=1e-5)


@variants
def test_only_the_codebook_loss_reaches_parameters(name):
    latent, params = latents_and_params(name)
    _, (_, to_params) = results(name)
    assert all(np.any(gradient) for gradient in jax.tree.leaves(to_params))

    def others(params):
        output = make(name).apply({"params": params}, latent)
        return jnp.sum(WEIGHTS * output.vectors) + output.losses["commitment"]

    assert not any(np.any(gradient) for gradient in jax.tree.leaves(jax.jit(jax.grad(others))(params)))


@pytest.mark.parametrize("upto", [0, 4, -1])
@variants
def test_decoding_another_number_of_levels_is_refused(name, upto):
    _, params = latents_and_params(name)
    with pytest.raises(ValueError, match=f"upto must be from 1 to 3, the number of levels, not {upto}"):
        make(name).apply({"params": params}, results(name)[0].codes, upto, method="decode")


@variants
def test_every_level_is_counted_alone(name):
    output, _ = results(name)
    codes = np.asarray(output.codes)
    parts = np.moveaxis(codes, -1, 0) if name != "multi_scale" else np.split(codes, [1, 5], axis=1)
    counts = make(name).counts(output.codes)
    np.testing.assert_array_equal(counts, [np.bincount(part.ravel(), minlength=K) for part in parts])
    assert len(make(name).level_names) == LEVELS
    level_of = make(name).level_of(*results(name)[0].vectors.shape[1:3])
    for level, own in enumerate(parts):
        np.testing.assert_array_equal(np.sort(codes[:, level_of == level], axis=None), np.sort(own, axis=None))
    assert len({tuple(row) for row in np.asarray(counts)}) == LEVELS


@variants
def test_folding_replaces_codebook_and_bridge_and_nothing_else(name):
    latent, params = latents_and_params(name)
    net = TokenizerNet(make(name), 32, (1,), 1, 8)
    plain, folded = fold(net, {"params": {"quantizer": params}})
    assert plain.quantizer.bridge == "none"
    assert type(plain.quantizer) is type(net.quantizer)
    kept = {key for key in params if key.startswith("phi_")}
    assert len(kept) == (2 if name == "multi_scale" else 0)
    assert set(folded["params"]["quantizer"]) == {"codebook"} | kept
    output = jax.jit(plain.quantizer.apply)({"params": folded["params"]["quantizer"]}, latent)
    np.testing.assert_array_equal(output.codes, results(name)[0].codes)
    np.testing.assert_allclose(output.vectors, results(name)[0].vectors, atol=1e-5)


@variants
def test_a_section_that_was_written_as_json_gives_the_same_quantizer(name):
    settings = json.loads(json.dumps(quantizer_settings(make(name))))
    assert make_quantizer(settings) == make(name)
    hash(make_quantizer(settings))  # jit needs it


@variants
def test_search_options_reach_the_search(name):
    latent, params = latents_and_params(name)

    def lowered(platform="cpu", **options):
        apply = jax.jit(lambda latent, params: make(name, **options).apply({"params": params}, latent))
        return apply.trace(latent, params).lower(lowering_platforms=(platform,)).as_text()

    assert "bf16" in lowered(search_precision="bf16")
    assert "bf16" not in lowered()
    assert "tpu_custom_call" in lowered("tpu")
    assert "tpu_custom_call" not in lowered("tpu", search_implementation="xla")


@variants
def test_it_all_stays_float32_in_a_network_of_bfloat16(name):
    latent, params = latents_and_params(name)
    # By the scan: on a GPU the search makes its float32 products of bfloat16 parts.
    quantizer = make(name).clone(dtype=jnp.bfloat16, bridge="none", search_implementation="xla")
    params = {key: value for key, value in params.items() if key != "bridge_net"}
    program = jax.make_jaxpr(quantizer.apply)({"params": params}, latent)
    assert "bf16" not in str(program)


BIG = 3 * 4096  # codes: more blocks than one for each of four devices, also of a level's own


@functools.cache
def compiled(name, one_look_up=True):
    """The program of the gradients on a mesh of 2 x 4; or of one that looks the codes of each level up alone."""
    mesh = mesh_of(2, 4)
    quantizer = make(name, mesh, codebook_size=BIG, bridge="none")
    latent, params = latents_and_params(name)
    params = {key: value for key, value in params.items() if key != "bridge_net"} | {"codebook": jnp.ones((BIG, D))}
    latent = jax.device_put(latent, NamedSharding(mesh, P(("data", "codebook"))))
    layout = shardings({"quantizer": params}, mesh, quantizer.rules)["quantizer"]

    def loss(params, latent):
        output = quantizer.apply({"params": params}, latent)
        if one_look_up:
            return sum(output.losses.values()) + output.vectors.sum()
        rows = [quantizer.rows(params["codebook"], codes) for codes in quantizer.by_level(output.codes)]
        return sum(jnp.square(part).sum() for part in rows)

    gradients = jax.jit(jax.grad(loss), out_shardings=layout)
    return gradients.lower(jax.device_put(params, layout), latent).compile().as_text()


def summed_over_devices(program, *dims):
    """How many float32 arrays [*dims] all-reduces of the program result in."""
    results = [match[1] for match in map(COLLECTIVE.search, program.splitlines()) if match and match[2] == "all-reduce"]
    return " ".join(results).count(f"f32[{','.join(map(str, dims))}]")


@pytest.mark.slow
@variants
def test_gradients_of_all_levels_reach_the_rows_in_one_sum_over_devices(name):
    assert summed_over_devices(compiled(name), BIG // 4, D) == 1
    assert summed_over_devices(compiled(name, one_look_up=False), BIG // 4, D) == LEVELS


@variants
def test_rows_never_leave_their_device_and_no_array_has_tokens_times_codes(name):
    program, tokens = compiled(name), 8 * SIDE**2 // 2  # of all devices along `codebook`
    assert max(math.prod(dims) for _, _, dims in collectives(program)) <= BIG // 4 * D
    sizes = {dims for _, dims in arrays(program)}
    codes = BIG // 4 // (LEVELS if "own" in name else 1)  # of a level on a device
    block = nearest_cpu.default_block_size(codes, D)
    assert size(tokens, block) in sizes
    # Beside scores there are the codes that are read again, a block for every token.
    assert max(map(math.prod, sizes)) <= max(tokens * block * (D + 1), BIG // 4 * D) < tokens * codes


TWINS = [
    ("residual", (5, 3), {"depth": 3}),
    ("residual", (5, 3), {"depth": 5, "shared_codebook": False}),
    ("multi_scale", (7, 7), {"scales": (1, 3, 4, 7), "phi_count": 4}),
    ("multi_scale", (5, 5), {"scales": (2, 3, 5), "phi_count": 3}),
    ("multi_scale", (6, 6), {"scales": (1, 2, 4, 6), "phi_count": 1}),
]


@pytest.mark.parametrize(("name", "grid", "options"), TWINS)
def test_an_independent_module_finds_the_same_codes_losses_and_gradients(name, grid, options):
    torch = pytest.importorskip("torch")
    from tests.helpers import torch_levels

    k, d, rng = 50, 6, np.random.default_rng(3)
    quantizer = make_quantizer({"name": name, "codebook_size": k, "code_dim": d, "bridge": "none", **options})
    latent = rng.normal(size=(2, *grid, d))
    shapes = jax.eval_shape(quantizer.init, jax.random.key(0), jnp.float32(latent))["params"]
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape) * np.prod(leaf.shape[:-1]) ** -0.5, shapes)
    params["codebook"] = rng.normal(size=(k, d)) * np.geomspace(0.1, 1.5, k)[:, None]
    weights = rng.normal(size=latent.shape)

    def total(params, latent):
        output = quantizer.apply({"params": params}, latent)
        value = output.losses["codebook"] + 0.25 * output.losses["commitment"] + jnp.sum(weights * output.vectors)
        return value, output

    found, output = jax.jit(jax.grad(total, (0, 1), has_aux=True))(*jax.tree.map(jnp.float32, (params, latent)))

    leaves = {path: torch.tensor(leaf, requires_grad=True) for path, leaf in flatten(params).items()}
    z = torch.tensor(latent, requires_grad=True)
    channels_first = z.permute(0, 3, 1, 2)
    if name == "residual":
        book, depth = leaves["codebook"], quantizer.depth
        books = [book] * depth if quantizer.shared_codebook else [book[level::depth] for level in range(depth)]
        vectors, codes, pull, commitment = torch_levels.residual(channels_first, books)
        codes = codes if quantizer.shared_codebook else codes * depth + torch.arange(depth)
    else:
        phis = [f"phi_{i}/conv" for i in range(quantizer.phi_count)]
        kernels = [leaves[f"{phi}/kernel"].permute(3, 2, 0, 1) for phi in phis]
        biases = [leaves[f"{phi}/bias"] for phi in phis]
        arguments = channels_first, leaves["codebook"], kernels, biases, quantizer.scales
        vectors, codes, pull, commitment = torch_levels.multi_scale(*arguments)
    vectors = vectors.permute(0, 2, 3, 1)
    (pull + 0.25 * commitment + (vectors * torch.tensor(weights)).sum()).backward()

    np.testing.assert_array_equal(output.codes, codes)
    assert relative_error(output.vectors, vectors.detach()) < 1e-4
    np.testing.assert_allclose(output.losses["codebook"], pull.detach(), rtol=1e-4)
    np.testing.assert_allclose(output.losses["commitment"], commitment.detach(), rtol=1e-4)
    assert relative_error(found[1], z.grad) < 1e-4
    for path, gradient in flatten(found[0]).items():
        assert relative_error(gradient, leaves[path].grad) < 1e-4, path
