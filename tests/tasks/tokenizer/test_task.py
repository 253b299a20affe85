import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fvq_jax.runtime.mesh import global_batch, make_mesh, replicated
from fvq_jax.tasks import TASKS
from fvq_jax.tasks.tokenizer.fields import use_quantizer
from tests.helpers.golden64 import COLUMNS, in_float32, in_float64, summation_error
from tests.helpers.golden_case import load_case, relative_error
from tests.helpers.tiny import abstract_state_of, make_step, random_images, random_state, tiny_config

SIZE = 16  # of the images
QUICK = {"xla_backend_optimization_level": 0}  # to compile, and slower to run


def one_device_mesh():
    return jax.make_mesh(
        (1, 1), ("data", "codebook"), axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=jax.devices()[:1]
    )


def step_of(mesh=None, **changes):
    return make_step(tiny_config(**changes), mesh or one_device_mesh())


@functools.cache
def compiled(full_mesh=False, **changes):
    """A step, and the step jitted, quick to compile; tests that differ only in their state share one program."""
    step = step_of(make_mesh(data=2, codebook=4) if full_mesh else None, **changes)
    layout = jax.tree.map(lambda leaf: leaf.sharding, abstract_state_of(step))
    options = None if step.accumulate > 1 else QUICK  # with which the loop over micro-batches takes seconds
    return step, jax.jit(step.__call__, out_shardings=(layout, replicated(step.mesh)), compiler_options=options)


def run(state, steps=1, batch=16, **changes):
    """The state after so many steps from `state`, and each step's scalars."""
    step, jitted = compiled(**changes)
    rows = []
    for i in range(steps):
        images = random_images(batch, SIZE, i)
        state, metrics = jitted(state, global_batch({"image": images}, step.mesh), step.task.frozen)
        rows.append({name: float(value) for name, value in metrics.scalars.items()})
    return state, rows


def first_step(at=0, batch=16, **changes):
    """The state before and after one step that counts as step `at`, and the scalars."""
    before = random_state(compiled(**changes)[0], at=at)
    after, rows = run(before, batch=batch, **changes)
    return before, after, rows[0]


def forward(batch=16, **changes):
    """The tokenizer's loss terms at random codes; no gradients, which take most of the time to compile."""
    step = step_of(**changes)
    state = random_state(step)
    critic = state.networks.get("discriminator")
    images = as_float(random_images(batch, SIZE))
    params, key = state.networks["tokenizer"].params, jax.random.key(0)
    _, (_, terms, *_) = jax.jit(step.task.losses.tokenizer, compiler_options=QUICK)(
        params, {}, critic and critic.all_variables(), images, True, key, step.task.frozen
    )
    return {name: float(value) for name, value in terms.items()}


@functools.cache
def plain_forward():
    return forward()


def as_float(images):
    return jnp.asarray(images.astype(np.float32) / 127.5 - 1)


def largest_difference(a, b):
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(np.abs(x - y).max()), a, b)))


# In this step, counted from 1, the discriminator comes in, and with it the first kinks of the training. One of its
# hidden units (image 0, channel 5, row 3, column 0 behind norm_3) is at -1.6e-6 on the reconstruction in exact
# arithmetic, and the published float32 run rounded it to the other side. No loss of that step sees it but both
# gradient norms do, by up to 8e-5, and the steps after it by 10 % and more.
KINK_STEP = 5
NORMS = [column.endswith("grad_norm") for column in COLUMNS]


def errors_by_column(actual, expected):
    """Errors of all rows, over the largest value of the column; `gen_adv` crosses zero."""
    # The adversarial term is not computed before it counts; the published code logs it all the same.
    active = np.ones_like(expected, bool)
    active[: KINK_STEP - 1, list(COLUMNS).index("gen_adv")] = False
    return np.where(active, np.abs(actual - expected), 0) / np.abs(expected).max(axis=0)


def test_the_training_run_equals_the_published_one_until_that_rounds_across_a_kink():
    expected, actual = load_case("training_run").outputs, in_float64("training_run")
    assert {value.dtype.name for value in actual.values()} == {"float64"}
    assert list(expected["columns"]) == list(COLUMNS)
    np.testing.assert_allclose(actual["rows"][:, 0], expected["rows"][:, 0], rtol=1e-12)
    errors = errors_by_column(actual["rows"], expected["rows"])
    assert errors[: KINK_STEP - 1].max() < 1e-5
    assert errors[KINK_STEP - 1, ~np.array(NORMS)].max() < 1e-5
    assert errors[KINK_STEP - 1].max() < 1e-3


@pytest.mark.slow
def test_all_of_the_training_run_equals_an_independent_one():
    """Twelve steps, and what the final and the averaged weights reconstruct."""
    torch = pytest.importorskip("torch")
    from tests.helpers import torch_golden

    actual, expected = in_float64("training_run"), torch_golden.compute("training_run", torch.float64)
    assert errors_by_column(actual["rows"], expected["rows"]).max() < 1e-10
    for name in ("final_reconstruction", "ema_reconstruction"):
        assert relative_error(actual[name], expected[name]) < 1e-10, name


@pytest.mark.slow
def test_the_independent_training_run_equals_the_published_one_once_it_rounds_one_unit_alike():
    """Told of the unit at the kink and of nothing else, exact arithmetic meets every published row.

    In the last two, rounding moves another unit; up to there nothing is left but the rounding of what is written down.
    """
    torch = pytest.importorskip("torch")
    from tests.helpers import torch_golden

    expected = load_case("training_run").outputs
    actual = torch_golden.compute("training_run", torch.float64, kinks={KINK_STEP: -2e-6})
    assert actual["between"] == 2  # that one unit, in the update of the tokenizer and in that of the discriminator
    errors = np.abs(actual["rows"] - expected["rows"]) / np.abs(expected["rows"]).max(axis=0)
    assert errors[:10].max() < 1e-4
    assert errors[10:].max() < 1e-2
    for name in ("final_reconstruction", "ema_reconstruction"):
        assert relative_error(actual[name], expected[name]) < 1e-2, name


@pytest.mark.slow
def test_float32_trains_as_float64_does_until_the_first_kink():
    expected, actual = in_float64("training_run")["rows"], in_float32("training_run")["rows"]
    assert actual.dtype == np.float32
    allowed = summation_error(load_case("training_run").inputs["images"][0].size)
    errors = errors_by_column(actual, expected)
    assert errors[: KINK_STEP - 1].max() < allowed
    assert errors[KINK_STEP - 1, ~np.array(NORMS)].max() < allowed
    assert np.isfinite(actual).all()


# Both networks and a moving average; the discriminator takes part from the third step on.
CRITIC = {"adversarial.weight": 0.5, "adversarial.start": 3, "optim.ema_decay": 0.75}
ACTIVE = 2


@pytest.mark.slow
def test_eight_devices_give_the_loss_curve_of_one():
    """From codes that differ and are used, over 5 steps, with the discriminator and its global BatchNorm."""
    curves = []
    for mesh in ({}, {"full_mesh": True}):
        state = random_state(compiled(**mesh, **CRITIC)[0], at=ACTIVE)
        curves.append(run(state, steps=5, **mesh, **CRITIC)[1])
    assert curves[0][0]["usage/batch"] > 0.2
    assert all(row["loss/discriminator"] > 0 for row in curves[0])
    for one, eight in zip(*curves, strict=True):
        for name in ("loss/total", "loss/codebook", "loss/adversarial", "loss/discriminator", "grad_norm/tokenizer"):
            np.testing.assert_allclose(eight[name], one[name], rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_each_network_learns_from_its_own_loss_only():
    """And one that takes part from the start is trained as one that joined."""
    row = first_step(ACTIVE, **CRITIC)[-1]
    at_once = CRITIC | {"adversarial.start": 1}
    # How the tokenizer's losses are weighted is nothing to the discriminator ...
    other = first_step(**at_once, **{"tokenizer.quantizer.codebook_weight": 7.0, "loss.reconstruction_weight": 3.0})[-1]
    assert other["grad_norm/discriminator"] == pytest.approx(row["grad_norm/discriminator"], rel=1e-5)
    assert other["grad_norm/tokenizer"] != pytest.approx(row["grad_norm/tokenizer"], rel=1e-2)
    # ... and the tokenizer does not see the discriminator's loss: hinge and vanilla share the generator's term.
    other = first_step(**at_once, **{"adversarial.loss": "vanilla"})[-1]
    assert other["grad_norm/tokenizer"] == pytest.approx(row["grad_norm/tokenizer"], rel=1e-5)
    assert other["grad_norm/discriminator"] != pytest.approx(row["grad_norm/discriminator"], rel=1e-2)


def test_the_adversarial_terms_wait_for_their_step():
    state = random_state(compiled(**CRITIC)[0])
    before = state.networks["discriminator"].params
    state, rows = run(state, steps=2, **CRITIC)
    assert [row["loss/discriminator"] for row in rows] == [0, 0]
    assert [row["loss/adversarial"] for row in rows] == [0, 0]
    assert largest_difference(before, state.networks["discriminator"].params) == 0
    state, rows = run(state, **CRITIC)
    assert rows[0]["loss/discriminator"] > 0
    assert largest_difference(before, state.networks["discriminator"].params) > 0


@pytest.mark.slow
def test_micro_batches_give_the_gradient_of_the_whole_batch():
    """Of the tokenizer, before the discriminator takes part: its BatchNorm sees micro-batches by definition."""
    whole, split = (first_step(**CRITIC, **{"optim.accumulate": n})[-1] for n in (1, 4))
    for name in ("loss/total", "grad_norm/tokenizer", "usage/batch"):
        assert split[name] == pytest.approx(whole[name], rel=1e-5), name


@pytest.mark.slow
def test_batch_norm_sees_the_micro_batch():
    whole, split = (first_step(ACTIVE, **CRITIC, **{"optim.accumulate": n})[-1] for n in (1, 4))
    assert abs(split["loss/discriminator"] - whole["loss/discriminator"]) > 1e-5 * whole["loss/discriminator"]


@pytest.mark.slow
def test_the_adaptive_weight_balances_the_gradients_of_the_last_layer():
    changes = {"adversarial.weight": 0.5, "adversarial.adaptive": True}
    losses = compiled(**changes)[0].task.losses
    before, _, row = first_step(**changes)
    images = as_float(random_images(16, SIZE))
    params, critic = before.networks["tokenizer"].params, before.networks["discriminator"]

    def of_last_layer(loss):
        def value(kernel):
            conv = {"conv": {**params["decoder"]["conv_out"]["conv"], "kernel": kernel}}
            changed = {**params, "decoder": {**params["decoder"], "conv_out": conv}}
            return loss(losses.net.apply({"params": changed}, images).reconstruction)

        return jnp.linalg.norm(jax.grad(value)(params["decoder"]["conv_out"]["conv"]["kernel"]).ravel())

    @jax.jit
    def both():
        image = of_last_layer(lambda r: losses.image(r, images, {})[0])
        return image, of_last_layer(lambda r: losses.adversarial(critic.all_variables(), r)[0])

    image, adversary = both()
    assert row["adversarial_weight"] == pytest.approx(0.5 * float(image) / (float(adversary) + 1e-4), rel=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"loss.reconstruction": "l1"},
        {"loss.reconstruction_weight": 2.0},
        {"tokenizer.quantizer.codebook_weight": 2.0},
        {"tokenizer.quantizer.commitment_weight": 2.0},
        {"tokenizer.quantizer.entropy_weight": 0.1},
        {"adversarial.weight": 0.3, "adversarial.start": 1},
        {"tokenizer.quantizer.l2_normalize": True},
        {"tokenizer.dtype": "bfloat16"},
        {"tokenizer.quantizer.bridge": "linear"},
        {"tokenizer.quantizer.bridge_groups": "1d"},
    ],
    ids=str,
)
def test_every_loss_option_changes_the_loss(changes):
    assert forward(**changes)["loss/total"] != plain_forward()["loss/total"]


def test_the_entropy_term_needs_its_weight_and_temperature():
    terms = [
        forward(**{"tokenizer.quantizer.entropy_weight": 0.1, "tokenizer.quantizer.entropy_temperature": temperature})[
            "loss/entropy"
        ]
        for temperature in (0.01, 1.0)
    ]
    assert terms[0] != terms[1]
    assert "loss/entropy" not in plain_forward()


def test_lpips_is_part_of_the_loss(tmp_path):
    from safetensors.numpy import save_file

    from fvq_jax.models.frozen.lpips import STAGES, WIDTHS, lpips_distance

    rng = np.random.default_rng(0)
    tensors, channels = {}, 3
    for stage, width in enumerate(WIDTHS):
        for index in STAGES[stage]:
            tensors[f"net.slice{stage + 1}.{index}.weight"] = rng.normal(
                0, (2 / 9 / channels) ** 0.5, (width, channels, 3, 3)
            ).astype(np.float32)
            tensors[f"net.slice{stage + 1}.{index}.bias"] = np.zeros(width, np.float32)
            channels = width
        tensors[f"lin{stage}.model.1.weight"] = np.full((1, width, 1, 1), 0.1, np.float32)
    save_file(tensors, tmp_path / "lpips.safetensors")
    changes = {"loss.perceptual_weight": 0.5, "loss.lpips_path": str(tmp_path / "lpips.safetensors")}
    step, row = step_of(**changes), forward(batch=2, **changes)
    task, images = step.task, as_float(random_images(2, SIZE))

    @jax.jit
    def distance(params, images):
        reconstruction = task.net.apply({"params": params}, images).reconstruction
        return lpips_distance(task.frozen["lpips"], images, reconstruction).mean()

    expected = float(distance(random_state(step).networks["tokenizer"].params, images))
    assert row["loss/perceptual"] == pytest.approx(expected, rel=1e-4)
    total = row["loss/reconstruction"] + row["loss/codebook"] + 0.25 * row["loss/commitment"] + 0.5 * expected
    assert row["loss/total"] == pytest.approx(total, rel=1e-4)


def test_a_separate_rate_moves_codebook_and_bridge_only():
    """By the optimizer alone, since gradients do not depend on rates."""
    moved = []
    for rate in (0.0, 1e-2):
        step = step_of(**{"optim.codebook_learning_rate": rate})
        params, optimizer = random_state(step).networks["tokenizer"].params, step.optimizers["tokenizer"]

        @functools.partial(jax.jit, compiler_options=QUICK)
        def updates(params, optimizer=optimizer):
            return optimizer.update(jax.tree.map(jnp.ones_like, params), optimizer.init(params), params)[0]

        found = updates(params)
        moved.append(
            {name: largest_difference(found[name], jax.tree.map(jnp.zeros_like, found[name])) for name in found}
        )
    assert moved[0].keys() == moved[1].keys() > {"quantizer"}
    for name in moved[0]:
        more = moved[1][name] / moved[0][name]
        assert more > 5 if name == "quantizer" else more == pytest.approx(1, rel=1e-3), name


def test_the_moving_average_follows_the_weights():
    before, after, _ = first_step(**CRITIC)
    params = after.networks["tokenizer"].params
    expected = jax.tree.map(lambda e, p: 0.75 * np.asarray(e) + 0.25 * np.asarray(p), before.ema, params)
    assert largest_difference(expected, after.ema) < 1e-6
    assert largest_difference(before.ema, after.ema) > 1e-5


def test_a_step_that_is_not_finite_keeps_everything_but_the_step():
    state = random_state(compiled(**CRITIC)[0], at=ACTIVE)
    network = state.networks["tokenizer"]
    broken = {**network.params, "quant_conv": jax.tree.map(lambda x: x * jnp.nan, network.params["quant_conv"])}
    before = state.replace(networks={**state.networks, "tokenizer": network.replace(params=broken)})
    after, rows = run(before, **CRITIC)
    assert not np.isfinite(rows[0]["loss/total"])
    assert int(after.step) == ACTIVE + 1
    assert int(after.skipped) == 1
    for old, new in zip(jax.tree.leaves(before.networks), jax.tree.leaves(after.networks), strict=True):
        np.testing.assert_array_equal(old, new)
    for old, new in zip(jax.tree.leaves(before.ema), jax.tree.leaves(after.ema), strict=True):
        np.testing.assert_array_equal(old, new)
    assert rows[0]["skipped_steps"] == 1


@functools.cache
def evaluation():
    step = step_of()
    state, evaluator = random_state(step), step.task.evaluator
    folded = jax.jit(evaluator.folded)(step.task.scored_variables(state))
    return step.task, state, folded, jax.jit(evaluator.reconstruct)


def test_evaluation_sees_the_same_codes_as_training():
    task, state, folded, reconstruct = evaluation()
    images = random_images(8, SIZE)
    reconstruction, codes, error, power = reconstruct(folded, images)
    output = jax.jit(task.net.apply)({"params": state.networks["tokenizer"].params}, as_float(images))
    np.testing.assert_array_equal(codes, output.quantized.codes)
    np.testing.assert_allclose(reconstruction, np.clip(output.reconstruction, -1, 1), atol=1e-5)
    np.testing.assert_allclose(error, output.error, rtol=1e-4)
    np.testing.assert_allclose(power, output.power, rtol=1e-4)


def test_a_step_finds_codes_in_a_tree():
    """On a mesh, with gradients, and the same codes as without."""
    _, after, row = first_step(full_mesh=True)
    _, by_tree, row_by_tree = first_step(full_mesh=True, **{"tokenizer.quantizer.search_implementation": "tree"})
    assert row_by_tree == pytest.approx(row, rel=1e-5)
    assert largest_difference(by_tree.networks["tokenizer"].params, after.networks["tokenizer"].params) < 1e-5


def test_evaluation_computes_in_float32():
    # By the scan: on a GPU the search makes its float32 products of bfloat16 parts.
    step = step_of(**{"tokenizer.dtype": "bfloat16", "tokenizer.quantizer.search_implementation": "xla"})
    images, evaluator = jax.ShapeDtypeStruct((8, SIZE, SIZE, 3), np.uint8), step.task.evaluator
    folded = jax.eval_shape(evaluator.folded, step.task.scored_variables(step.abstract()))
    assert "bf16" not in str(jax.make_jaxpr(evaluator.reconstruct)(folded, images))


def test_a_window_counts_the_codes_by_position_too():
    task = step_of().task
    positions = task.net.quantizer.positions()
    scalars = task.window_scalars({"codes": (positions != 2)[None].astype(np.int64)})
    assert (scalars["positions/window/usage_min"], scalars["positions/window/dead"]) == (0, 1)
    assert scalars["usage/window"] == 0.75


def test_the_window_counts_levels_with_codes_of_their_own_by_those():
    config = tiny_config()
    size = config.tokenizer.quantizer.codebook_size
    use_quantizer(config, "residual", codebook_size=size, bridge="none", depth=2, shared_codebook=False)
    task = TASKS["tokenizer"](config, make_mesh(1, 1, devices=jax.devices()[:1]))
    counts = np.zeros((2, size), np.int64)
    counts[0, ::2], counts[1, 1] = 1, 5
    scalars = task.window_scalars({"codes": counts})
    assert scalars["usage/window/level_1"] == 1
    assert scalars["usage/window/level_2"] == 2 / size
