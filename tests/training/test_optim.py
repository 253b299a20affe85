import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fvq_jax.training.optim import Annealing, guarded, kept_unless, learning_annealing, make_optimizer
from tests.helpers.golden_case import load_case

NAMES = {"lin": "linear", "cos": "cosine", "const": "constant"}


@pytest.mark.parametrize("decay", NAMES)
@pytest.mark.parametrize("case", ["a", "b", "c"])
def test_learning_annealing_equals_the_published_one(case, decay):
    golden = load_case("learning_annealing")
    options = golden.config[case]
    schedule = learning_annealing(
        options["total"],
        options["warmup"],
        hold=options["hold"],
        decay=NAMES[decay],
        start=golden.config["start"],
        end=golden.config["end"],
    )
    steps = np.arange(options["total"])
    np.testing.assert_allclose(schedule(steps), golden.outputs[f"{case}/{decay}"], rtol=2e-5, atol=2e-6)


def test_learning_annealing_defaults_are_the_papers():
    golden = load_case("learning_annealing")
    assert golden.config["a"]["hold"] == 0.3
    schedule = learning_annealing(400, 40)
    np.testing.assert_allclose(schedule(np.arange(400)), golden.outputs["a/lin"], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (2, 1), (3, 0)])
def test_the_shortest_runs_have_finite_rates(total, warmup):
    for decay in NAMES.values():
        values = learning_annealing(total, warmup, hold=0.0, decay=decay)(np.arange(total + 2))
        assert np.all(np.isfinite(values))
        assert np.all((values > 0) & (values <= 1))


def test_the_rate_never_rises_again_after_the_last_step():
    for decay in ("linear", "cosine"):
        values = learning_annealing(20, 5, decay=decay)(np.arange(19, 60))
        np.testing.assert_allclose(values, 0.01, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((10, 2), {"decay": "step"}, "unknown decay 'step': use one of linear, cosine, constant"),
        ((10, 2), {"hold": 1.0}, r"hold must be in \[0, 1\), not 1.0"),
        ((10, 2), {"hold": -0.1}, r"hold must be in \[0, 1\), not -0.1"),
        ((10, 10), {}, "a warm-up of 10 steps does not fit into 10 steps"),
        ((10, -1), {}, "a warm-up of -1 steps"),
        ((0, 0), {}, "0 steps"),
    ],
)
def test_schedules_that_cannot_be_are_refused(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        learning_annealing(*arguments, **options)


def test_a_rate_is_its_peak_times_the_multiplier():
    schedule = Annealing(10, 2).rate(2e-4)
    np.testing.assert_allclose(schedule(jnp.asarray(2)), 2e-4)
    np.testing.assert_allclose(schedule(jnp.asarray(9)), 2e-6, rtol=1e-5)


@pytest.mark.parametrize("own", [None, "constant", "linear"])
def test_every_rate_of_a_run_follows_its_annealing_with_a_decay_of_its_own_if_it_has_one(own):
    annealing = Annealing(40, 5, hold=0.1, decay="cosine", start=0.2, end=0.3)
    options = {"hold": 0.1, "start": 0.2, "end": 0.3}
    expected = learning_annealing(40, 5, decay=own or "cosine", **options)(np.arange(40))
    np.testing.assert_allclose(annealing.rate(0.5, own)(np.arange(40)), 0.5 * expected, rtol=1e-6)


PARAMS = {
    "encoder": {"conv": jnp.ones((3, 2))},
    "quantizer": {"codebook": jnp.ones((4, 2)), "bridge_net": {"recover": {"kernel": jnp.ones(2)}}},
}
ADAM = {"b1": 0.9, "b2": 0.95, "clip_norm": 0.0}


def gradients(scale=1.0, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(scale * rng.normal(size=leaf.shape), jnp.float32), PARAMS)


def updates(scales=(1.0, 3.0, 0.5), rate=0.1, codebook_rate=None, **options):
    """All updates of a few steps with gradients of these sizes."""
    optimizer = make_optimizer(
        optax.constant_schedule(rate),
        own_rates={} if codebook_rate is None else {"quantizer": optax.constant_schedule(codebook_rate)},
        **(ADAM | options),
    )
    state, every = optimizer.init(PARAMS), []
    for i, scale in enumerate(scales):
        update, state = optimizer.update(gradients(scale, seed=i), state, PARAMS)
        every.append(update)
    return every


def adam_in_numpy(gradient_list, b1, b2, rate):
    """arXiv 1412.6980, Algorithm 1."""
    m = v = 0.0
    for t, g in enumerate(gradient_list, 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        yield -rate * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + 1e-8)


@pytest.mark.parametrize("options", [{}, {"b1": 0.5}, {"b2": 0.5}])
def test_updates_are_those_of_adam(options):
    hyper = ADAM | options
    grads = [np.asarray(gradients(s, i)["quantizer"]["codebook"], np.float64) for i, s in enumerate((1.0, 3.0, 0.5))]
    expected = adam_in_numpy(grads, hyper["b1"], hyper["b2"], 0.1)
    for update, value in zip(updates(**options), expected, strict=True):
        np.testing.assert_allclose(update["quantizer"]["codebook"], value, rtol=1e-4)


def test_clipping_is_by_the_global_norm_of_the_network():
    def by_hand(scale, seed):
        grads = gradients(scale, seed)
        return jax.tree.map(lambda g: g * min(1.0, 2.0 / float(optax.tree.norm(grads))), grads)

    optimizer = make_optimizer(optax.constant_schedule(0.1), **ADAM)
    state = optimizer.init(PARAMS)
    scales = (0.01, 3.0, 0.5)  # below the norm, above, and around it
    for i, clipped in enumerate(updates(scales, clip_norm=2.0)):
        expected, state = optimizer.update(by_hand(scales[i], i), state, PARAMS)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), clipped, expected)


def test_a_separate_rate_moves_codebook_and_bridge_only():
    one, two = updates(rate=0.1), updates(rate=0.1, codebook_rate=0.02)
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(b["encoder"]["conv"], a["encoder"]["conv"], rtol=1e-6)
        scaled_down = jax.tree.map(lambda leaf: 0.2 * leaf, a["quantizer"])
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), b["quantizer"], scaled_down)


def test_a_separate_rate_has_its_own_decay():
    annealing = Annealing(3, 0, hold=0.0)
    falling, constant = annealing.rate(0.1), annealing.rate(0.1, "constant")
    optimizer = make_optimizer(falling, own_rates={"quantizer": constant}, **ADAM)
    plain = make_optimizer(constant, **ADAM)
    state, plain_state = optimizer.init(PARAMS), plain.init(PARAMS)
    for i in range(3):
        update, state = optimizer.update(gradients(seed=i), state, PARAMS)
        expected, plain_state = plain.update(gradients(seed=i), plain_state, PARAMS)
        jax.tree.map(np.testing.assert_array_equal, update["quantizer"], expected["quantizer"])
        factor = float(falling(i)) / 0.1
        np.testing.assert_allclose(update["encoder"]["conv"], factor * expected["encoder"]["conv"], rtol=1e-5)


def test_clipping_counts_all_parameters_when_rates_differ():
    with_both = updates(clip_norm=1.0, codebook_rate=0.1)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), with_both, updates(clip_norm=1.0, rate=0.1))


def test_several_parts_may_have_rates_of_their_own():
    rates = {"quantizer": optax.constant_schedule(0.02), "encoder": optax.constant_schedule(0.05)}
    optimizer = make_optimizer(optax.constant_schedule(0.1), own_rates=rates, **ADAM)
    update, _ = optimizer.update(gradients(), optimizer.init(PARAMS), PARAMS)
    (plain,) = updates((1.0,))
    for name, factor in {"quantizer": 0.2, "encoder": 0.5}.items():
        expected = jax.tree.map(lambda leaf, factor=factor: factor * leaf, plain[name])
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), update[name], expected)


def test_weight_decay_is_that_of_adamw():
    """arXiv 1711.05101: the decay is added after Adam, scaled by the rate, and seen by no moment."""
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32) + 2, PARAMS)
    plain = make_optimizer(optax.constant_schedule(0.1), **ADAM)
    decaying = make_optimizer(
        optax.constant_schedule(0.1), weight_decay=0.3, decayed=lambda name: name == "encoder/conv", **ADAM
    )
    state, decaying_state = plain.init(params), decaying.init(params)
    for i in range(3):
        update, state = plain.update(gradients(seed=i), state, params)
        decayed, decaying_state = decaying.update(gradients(seed=i), decaying_state, params)
        expected = update["encoder"]["conv"] - 0.1 * 0.3 * params["encoder"]["conv"]
        np.testing.assert_allclose(decayed["encoder"]["conv"], expected, rtol=1e-5)
        jax.tree.map(np.testing.assert_array_equal, decayed["quantizer"], update["quantizer"])


def test_parts_with_rates_of_their_own_decay_by_them():
    rates = {"quantizer": optax.constant_schedule(0.02)}
    zero = jax.tree.map(jnp.zeros_like, gradients())
    params = jax.tree.map(jnp.ones_like, zero)
    optimizer = make_optimizer(optax.constant_schedule(0.1), own_rates=rates, weight_decay=0.5, **ADAM)
    update, _ = optimizer.update(zero, optimizer.init(params), params)
    for name, rate in {"quantizer": 0.02, "encoder": 0.1}.items():
        jax.tree.map(lambda leaf, rate=rate: np.testing.assert_allclose(leaf, -0.5 * rate), update[name])


ALL_PARTS = {"own_rates": {"quantizer": lambda step: 0.02 * (step + 1)}, "weight_decay": 0.5, "clip_norm": 1.0}


@pytest.mark.parametrize("optimizer", ["adam", "all parts", "plain optax"])
def test_the_state_stays_unless_everything_is_finite(optimizer):
    made = {
        "adam": make_optimizer(lambda step: 0.1 / (step + 1), **ADAM),
        "all parts": make_optimizer(lambda step: 0.1 / (step + 1), **ADAM | ALL_PARTS),
        "plain optax": guarded(optax.adamw(lambda step: 0.1 / (step + 1))),
    }[optimizer]
    state = made.update(gradients(), made.init(PARAMS), PARAMS, finite=jnp.array(True))[1]
    wrong = jax.tree.map(lambda leaf: leaf * np.nan, gradients())
    kept = made.update(wrong, state, PARAMS, finite=jnp.array(False))[1]
    jax.tree.map(np.testing.assert_array_equal, kept, state)
    first = made.update(gradients(seed=1), state, PARAMS, finite=jnp.array(True))
    jax.tree.map(np.testing.assert_array_equal, made.update(gradients(seed=1), kept, PARAMS), first)


def test_moments_replace_the_old_ones_without_a_copy():
    """On a CPU; `optax.adam` shows what happens otherwise."""

    def copies(optimizer):
        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(params, state, grads, finite):
            updates, state = optimizer.update(grads, state, params, finite=finite)
            return kept_unless(finite, optax.apply_updates(params, updates), params), state

        params = {"codebook": jnp.ones((512, 64))}
        text = step.lower(params, optimizer.init(params), params, jnp.array(True)).compile().as_text()
        return len(re.findall(r"f32\[512,64\]\S* copy\(", text))

    assert copies(make_optimizer(optax.constant_schedule(0.1), **ADAM)) == 0
    assert copies(guarded(optax.adam(0.1))) == 2
