import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fvq_jax.models.quantizers.ema import EMAQuantizer

K, D = 24, 3


def make(**options):
    return EMAQuantizer(**{"codebook_size": K, "code_dim": D, "decay": 0.7, "restart_below": 0.0, **options})


def latents(step):
    return jnp.asarray(0.3 * np.random.default_rng(step).normal(size=(2, 4, 5, D)), jnp.float32)


@functools.cache
def start(**options):
    return jax.jit(make(**options).init)(jax.random.key(0), latents(0))


def step(variables, latent, key=None, **options):
    output, state = make(**options).apply(variables, latent, train=True, key=key, mutable=["moving"])
    return output, state


def test_every_code_follows_the_mean_of_its_latents():
    """Against the formula of the paper in float64, over three steps."""
    variables = start()
    book = np.float64(variables["moving"]["codebook"])
    hits, sums = np.zeros(K), np.zeros((K, D))
    for number in range(3):
        z = np.float64(latents(number)).reshape(-1, D)
        codes = np.argmin(np.linalg.norm(z[:, None] - book[None], axis=2), axis=1)
        output, variables = step(variables, latents(number))
        np.testing.assert_array_equal(np.asarray(output.codes).ravel(), codes)
        np.testing.assert_allclose(output.vectors.reshape(-1, D), book[codes], atol=1e-5)  # those before the update
        np.testing.assert_allclose(output.losses["commitment"], np.mean((z - book[codes]) ** 2), rtol=1e-5)
        hits = 0.7 * hits + 0.3 * np.bincount(codes, minlength=K)
        sums = 0.7 * sums + 0.3 * np.eye(K)[codes].T @ z
        smoothed = (hits + 1e-5) / (hits.sum() + K * 1e-5) * hits.sum()
        book = np.where(hits[:, None] > 0, sums / smoothed[:, None], book)
        for name, expected in (("codebook", book), ("hits", hits), ("sums", sums)):
            np.testing.assert_allclose(variables["moving"][name], expected, rtol=1e-5, atol=1e-5)
    assert 0 < np.sum(hits == 0) < K  # some were never chosen, and stay


def test_nothing_is_trained_and_commitment_is_the_only_term():
    assert set(start()) == {"moving"}
    assert not make().trained
    assert dict(make(commitment_weight=0.5).loss_weights) == {"commitment": 0.5}
    output, _ = step(start(), latents(0))
    assert set(output.losses) == {"commitment"}
    np.testing.assert_allclose(np.std(start(init_std=0.1)["moving"]["codebook"]), 0.1, rtol=0.2)


def test_dead_codes_are_put_onto_different_latents_and_count_like_the_average_code():
    variables, latent = start(), latents(0) + 5  # far from the codes, so that few are chosen
    output, state = step(variables, latent, jax.random.key(1), restart_below=0.2)
    moved = state["moving"]
    counts = np.bincount(np.asarray(output.codes).ravel(), minlength=K)
    average = 0.3 * counts.sum() / K
    dead = 0.3 * counts < 0.2 * average
    assert 0 < dead.sum() < K
    tokens = np.asarray(latent).reshape(-1, D)
    places = [np.flatnonzero(np.all(row == tokens, axis=1)).item() for row in np.asarray(moved["codebook"])[dead]]
    assert len(set(places)) == dead.sum()
    np.testing.assert_allclose(moved["hits"], np.where(dead, average, 0.3 * counts), rtol=1e-5)
    np.testing.assert_allclose(moved["sums"][dead], moved["codebook"][dead] * average, rtol=1e-5)
    other = step(variables, latent, jax.random.key(2), restart_below=0.2)[1]["moving"]["codebook"]
    assert np.any(np.asarray(other)[dead] != np.asarray(moved["codebook"])[dead])
    unmoved = step(variables, latent)[1]["moving"]["codebook"]
    np.testing.assert_array_equal(np.asarray(unmoved)[counts == 0], variables["moving"]["codebook"][counts == 0])


def test_a_restarted_code_is_given_time():
    """It is not dead again in the next step, although nothing chooses it."""
    far = jnp.full((2, 4, 5, D), 50, jnp.float32)
    _, state = step(start(), latents(0) + 5, jax.random.key(1), restart_below=0.2)
    _, after = step(state, far, jax.random.key(2), restart_below=0.2)
    kept = np.all(np.abs(after["moving"]["codebook"] - state["moving"]["codebook"]) < 1e-3, axis=1)
    assert kept.sum() >= K - 1


def test_drawing_latents_needs_a_key():
    with pytest.raises(ValueError, match="restart_below > 0 draws random latents: give a key"):
        step(start(), latents(0), restart_below=0.2)


def test_it_equals_the_package_that_is_used_most():
    """vector-quantize-pytorch starts hits at 1 and sums at the codes; from there on both go the same way."""
    torch = pytest.importorskip("torch")
    published = pytest.importorskip("vector_quantize_pytorch")
    book = np.array(start()["moving"]["codebook"])
    peer = published.VectorQuantize(
        dim=D, codebook_size=K, decay=0.7, threshold_ema_dead_code=0, commitment_weight=1.0, rotation_trick=False
    )
    codebook = peer._codebook
    for target, value in ((codebook.embed, book), (codebook.embed_avg, book), (codebook.cluster_size, np.ones(K))):
        target.data.copy_(torch.from_numpy(np.float32(value))[None])
    variables = {"moving": {"codebook": jnp.asarray(book), "hits": jnp.ones(K), "sums": jnp.asarray(book)}}
    peer.train()
    for number in range(3):
        z = latents(number)
        quantized, codes, loss = peer(torch.from_numpy(np.array(z).reshape(2, 20, D)))
        output, variables = step(variables, z)
        np.testing.assert_array_equal(np.asarray(output.codes).reshape(2, 20), codes.numpy())
        np.testing.assert_allclose(np.asarray(output.vectors).reshape(2, 20, D), quantized.detach().numpy(), atol=1e-5)
        np.testing.assert_allclose(output.losses["commitment"], loss.detach().numpy().item(), rtol=1e-5)
        np.testing.assert_allclose(variables["moving"]["codebook"], codebook.embed.numpy()[0], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(variables["moving"]["hits"], codebook.cluster_size.numpy()[0], rtol=1e-4)


def test_it_is_described_by_its_decay_and_sizes():
    assert make().description == "moving averages of 0.7"
    assert make().architecture() == {"codebook_size": K, "code_dim": D}
    with pytest.raises(ValueError, match=r"mesh.codebook 5 does not divide the 24 codes"):
        make().check(5)
    with pytest.raises(ValueError, match=r"moving averages of 0.7 has no classes: leave condition out"):
        make().apply(start(), 1, method="table")
