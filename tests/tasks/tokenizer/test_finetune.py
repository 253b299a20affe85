"""Starting from a converted tokenizer, training only a part of it, and the other discriminator."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from fvq_jax.config.checks import validate
from fvq_jax.inference.saved import load, load_params
from fvq_jax.inference.tokenizer import Tokenizer
from fvq_jax.interop.layouts import LAYOUTS
from fvq_jax.interop.named_tensors import write_safetensors
from fvq_jax.models.discriminators.stylegan import StyleGANDiscriminator
from fvq_jax.models.quantizers import make_quantizer
from fvq_jax.models.tokenizer import TokenizerNet
from fvq_jax.runtime.errors import InputError
from fvq_jax.runtime.mesh import make_mesh
from fvq_jax.runtime.names import flatten
from fvq_jax.tasks.tokenizer.task import TokenizerTask
from fvq_jax.training.checkpoint import Checkpoints
from fvq_jax.training.loop import train
from fvq_jax.training.state import create_state, with_params
from tests.helpers.random_tokenizer import random_params, random_tokenizer
from tests.helpers.tiny import make_step, random_images, spread_codes, tiny_config

ONE_LEVEL = {"tokenizer.ch_mult": (1,), "tokenizer.z_channels": 16, "tokenizer.attention_levels": (-1,)}
QUICK = {"xla_backend_optimization_level": 0}  # to compile, for what runs once or twice


def config_of(**changes):
    return tiny_config(**{**ONE_LEVEL, **changes})


def one_device():
    return jax.make_mesh((1, 1), ("data", "codebook"), (AxisType.Auto,) * 2, devices=jax.devices()[:1])


def two_steps(**changes):
    """The state before and after two steps of 8 images, and the scalars of the second."""
    config = config_of(batch_size=8, **{"optim.warmup_steps": 0, **changes})
    validate(config, TokenizerTask, 1)
    step = make_step(config, one_device(), config.steps)
    state = create_state(step.init, 0, step.abstract())
    network = state.networks["tokenizer"]
    params = spread_codes(network.params)
    ema = jax.tree.map(jnp.copy, params) if config.optim.ema_decay else {}
    state = state.replace(networks={**state.networks, "tokenizer": network.replace(params=params)}, ema=ema)
    before = jax.device_get(state)
    layout = jax.tree.map(lambda leaf: leaf.sharding, step.abstract())
    run = jax.jit(step.__call__, out_shardings=(layout, None), compiler_options=QUICK)
    for seed in range(2):
        state, metrics = run(state, {"image": random_images(8, 16, seed)}, {})
    return before, jax.device_get(state), jax.device_get(metrics.scalars)


def changed(before, after):
    """Names of the arrays that are not the same to the last bit."""
    before, after = flatten(before), flatten(after)
    assert before.keys() == after.keys()
    return {name for name in before if before[name].tobytes() != after[name].tobytes()}


@functools.cache
def run(train_only, **changes):
    return two_steps(**{"optim.train_only": train_only, "tokenizer.quantizer.restart_after": 1.0, **changes})


@pytest.mark.slow
@pytest.mark.parametrize("train_only", ["tokenizer", "decoder"])
def test_only_what_is_asked_for_changes(train_only):
    before, after, scalars = run(train_only, **{"adversarial.weight": 0.5, "optim.ema_decay": 0.9})
    tokenizers = [state.networks["tokenizer"].params for state in (before, after)]
    moved = {name.split("/")[0] for name in changed(*tokenizers)}
    everything = {"encoder", "quant_conv", "quantizer", "post_quant_conv", "decoder"}
    assert moved == ({"post_quant_conv", "decoder"} if train_only == "decoder" else everything)
    assert changed(before.ema, after.ema) == changed(*tokenizers)
    assert all(np.isfinite(value) for value in scalars.values())
    if train_only == "tokenizer":  # alone: there is no discriminator, whatever its weight
        assert after.networks.keys() == {"tokenizer"}
        assert not [name for name in scalars if "adversarial" in name or "discriminator" in name]
    else:
        critics = [state.networks["discriminator"] for state in (before, after)]
        for part in ("params", "variables", "opt_state"):
            assert changed(*(getattr(critic, part) for critic in critics)), part
        assert scalars["loss/adversarial"] != 0


def test_what_does_not_train_has_no_gradient():
    """So it counts neither for clipping nor in the gradient norm, and is never computed."""
    moments = flatten(run("decoder")[1].networks["tokenizer"].opt_state)
    assert any(np.any(value) for name, value in moments.items() if "/decoder/" in name)
    frozen = [value for name, value in moments.items() if "/encoder/" in name or "/quantizer/" in name]
    assert frozen
    assert not any(np.any(value) for value in frozen)


def test_a_decoder_learns_codes_that_stay():
    states = [state.networks["tokenizer"].variables for state in run("decoder")[:2]]
    assert "placement/quantizer/placement/offset" in flatten(states[0])
    assert not changed(*states)


def test_a_training_step_takes_the_stylegan_discriminator():
    """Shapes only: with its 512 channels a step takes minutes to compile on a CPU. Its losses run in the next test."""
    mesh = make_mesh(2, 4)
    config = config_of(**{"adversarial.weight": 0.5, "adversarial.discriminator": "stylegan"})
    validate(config, TokenizerTask, mesh.size)
    step = make_step(config, mesh, config.steps, 1)
    assert step.task.losses.discriminator == StyleGANDiscriminator(config.data.image_size)
    state = step.abstract()  # every array has its rule
    network = state.networks["discriminator"]
    assert network.variables == {}
    assert {"block_0", "dense_0", "dense_1"} <= network.params.keys()
    images = jax.ShapeDtypeStruct((16, 16, 16, 3), jnp.uint8)
    after, metrics = jax.eval_shape(step, state, {"image": images}, {})
    shapes = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree) for tree in (state, after)]
    assert shapes[0] == shapes[1]
    assert {"loss/discriminator", "grad_norm/discriminator"} <= metrics.scalars.keys()


def test_the_stylegan_discriminator_teaches_and_learns():
    """Both losses of the task through its 512 channels, at the smallest images it takes."""
    changes = {"weight": 0.5, "discriminator": "stylegan", "loss": "vanilla"}  # with hinge the last bias cancels out
    config = config_of(**{f"adversarial.{name}": value for name, value in changes.items()}, **{"data.image_size": 8})
    losses = TokenizerTask(config, one_device()).losses
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.uniform(-1, 1, (2, 2, 8, 8, 3)), jnp.float32)
    shapes = jax.eval_shape(lambda: losses.discriminator.init(jax.random.key(0), images[0], train=True))["params"]

    def start(leaf):
        bound = math.prod(leaf.shape[:-1]) ** -0.5
        return jnp.asarray(rng.uniform(-bound, bound, leaf.shape), jnp.float32)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def gradients(params, real, fake):
        learn, (loss, _) = jax.grad(losses.critic, has_aux=True)(params, {}, real, fake)
        teach = jax.grad(lambda fake: losses.adversarial({"params": params}, fake)[0])(fake)
        return learn, teach, loss

    params = jax.tree.map(start, shapes)
    learn, teach, before = gradients(params, *images)
    for leaf in jax.tree.leaves((learn, teach)):
        assert np.isfinite(leaf).all()
        assert np.any(leaf)
    after = gradients(jax.tree.map(lambda p, g: p - 0.01 * g, params, learn), *images)[2]
    assert after < before


def test_stylegan_takes_only_its_sizes():
    sizes = {"data.image_size": 24, "adversarial.discriminator": "stylegan"}
    with pytest.raises(InputError, match=r"data\.image_size 24 does not fit .*stylegan, which takes 8, 16, .*1024$"):
        validate(config_of(**{"adversarial.weight": 0.5, **sizes}), TokenizerTask, 8)
    validate(config_of(**sizes), TokenizerTask, 8)  # without any adversarial loss
    validate(config_of(**{"adversarial.weight": 0.5, "optim.train_only": "tokenizer", **sizes}), TokenizerTask, 8)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("optim.train_only", "one of nothing, tokenizer, decoder"),
        ("adversarial.discriminator", "one of patchgan, stylegan"),
    ],
)
def test_unknown_choices_are_refused(field, message):
    with pytest.raises(InputError, match=f"{field} must be {message}, not 'encoder'"):
        validate(config_of(**{field: "encoder"}), TokenizerTask, 8)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    tok = Tokenizer(random_tokenizer(ch_mult=(1,), bridge="XS/2"))
    tok.save_pretrained(folder / "native")
    tok.save_pretrained(folder / "fvq.safetensors", layout="fvq")
    tok.save_pretrained(folder / "llamagen.safetensors", layout="llamagen")
    return folder


@pytest.mark.slow
def test_a_run_starts_where_a_saved_tokenizer_ended_and_goes_on_without_it(saved, tmp_path):
    """A decoder-only run leaves the codes as they were; the average starts at the tokenizer too."""
    source = tmp_path / "x.safetensors"
    source.write_bytes((saved / "fvq.safetensors").read_bytes())
    changes = {"init_from": str(source), "optim.train_only": "decoder", "optim.ema_decay": 0.5, "eval.images": 16}
    config = config_of(**changes, steps=2)
    train(TokenizerTask, config, tmp_path / "run")
    start, end = load(source), load(tmp_path / "run")
    assert end.net == start.net
    moved = {part.split("/")[0] for part in changed(start.params, end.params)}
    assert moved == {"post_quant_conv", "decoder"}
    images = random_images(4, 16)
    before, after = Tokenizer(start), Tokenizer(end)
    codes = before.encode(images)
    np.testing.assert_array_equal(codes, after.encode(images))
    assert np.abs(before.decode(codes) - after.decode(codes)).max() > 1e-4

    source.unlink()
    train(TokenizerTask, config, tmp_path / "run")
    assert not changed(end.params, load(tmp_path / "run").params)
    with Checkpoints(tmp_path / "run") as checkpoints:
        assert checkpoints.latest_step() == 2


@pytest.mark.parametrize("name", ["native", "fvq.safetensors", "llamagen.safetensors"])
def test_every_kind_of_saved_tokenizer_can_be_started_from(name, saved):
    bridge = "none" if "llamagen" in name else "XS/2"

    def loaded(**changes):
        config = config_of(**{"tokenizer.quantizer.bridge": bridge, **changes})
        return TokenizerTask(config, one_device()).load(str(saved / name))

    assert not changed(loaded(), load(saved / name).params)
    assert not changed(loaded(**{"tokenizer.attention_levels": (len(config_of().tokenizer.ch_mult) - 1,)}), loaded())
    # Where there are no groups, the kind of groups is nothing that could differ.
    groups = {"tokenizer.quantizer.bridge_groups": "1d"}
    if bridge == "none":
        loaded(**groups)
    else:
        with pytest.raises(InputError, match=r"quantizer\.bridge_groups is '2d' there and '1d' here"):
            loaded(**groups)


@pytest.mark.parametrize(
    ("layout", "settings"),
    [
        ("llamagen", {"l2_normalize": True}),
        ("fvq_rq", {"name": "residual", "depth": 3, "bridge": "XS/2"}),
        ("var", {"name": "multi_scale", "scales": (1, 3, 8), "phi_count": 2}),
    ],
)
def test_the_config_says_what_the_tensors_of_a_file_do_not(layout, settings, tmp_path):
    settings = {"name": "vector", "codebook_size": 64, "code_dim": 16, "bridge": "none", **settings}
    net = TokenizerNet(make_quantizer(settings), ch=32, ch_mult=(1,), num_res_blocks=1, z_channels=16)
    params = random_params(net)
    write_safetensors(tmp_path / "x.safetensors", LAYOUTS[layout].tensors(net, params))
    assert not changed(load_params(tmp_path / "x.safetensors", net), params)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"tokenizer.quantizer.code_dim": 16, "tokenizer.quantizer.bridge": "S/4"},
            r"^init_from: .*native holds another network: tokenizer\.quantizer\.code_dim is 8 there and 16 here; "
            r"tokenizer\.quantizer\.bridge is 'XS/2' there and 'S/4' here$",
        ),
        ({"tokenizer.quantizer.l2_normalize": True}, "tokenizer.quantizer.l2_normalize is False there and True here"),
        ({"init_from": "nowhere"}, "^init_from: there is no tokenizer at nowhere"),
    ],
)
def test_what_cannot_be_started_from_is_refused_before_the_workdir_is_claimed(changes, message, saved, tmp_path):
    with pytest.raises(InputError, match=message):
        train(TokenizerTask, config_of(**{"init_from": str(saved / "native"), **changes}), tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.slow
def test_given_parameters_keep_the_layout():
    config = config_of(**{"mesh.data": 2, "mesh.codebook": 4, "optim.ema_decay": 0.9})
    mesh = make_mesh(2, 4)
    step = make_step(config, mesh, config.steps, 1)
    state = create_state(step.init, 0, step.abstract())
    params = random_tokenizer(ch_mult=(1,), bridge="XS/2").params
    placed = with_params(state, "tokenizer", params)
    assert not changed(jax.device_get(placed.networks["tokenizer"].params), params)
    assert not changed(jax.device_get(placed.ema), params)
    layouts = [jax.tree.map(lambda leaf: leaf.sharding, x.networks["tokenizer"].params) for x in (state, placed)]
    assert layouts[0] == layouts[1]
    assert placed.networks["tokenizer"].params["quantizer"]["codebook"].addressable_shards[0].data.shape == (16, 8)


def test_the_network_has_the_attention_and_the_convolutions_that_the_config_says():
    config = tiny_config(**{"tokenizer.attention_levels": [0, 1], "tokenizer.quant_kernel": 3})
    net = TokenizerTask(config, one_device()).net
    assert (net.attention_levels, net.quant_kernel) == ((0, 1), 3)


@pytest.mark.parametrize("attention", [(-1,), (0, 1)])
def test_a_run_starts_from_a_vqgan_of_the_same_network_only(attention, tmp_path):
    tok = Tokenizer(random_tokenizer(attention_levels=attention))
    tok.save_pretrained(tmp_path / "x.safetensors", layout="taming")
    lowest = {"tokenizer.z_channels": 16, "tokenizer.attention_levels": (-1,)}
    config = tiny_config(**lowest, **{"tokenizer.quantizer.bridge": "none"})
    config.tokenizer.quantizer.update({"codebook_size": 64, "code_dim": 8})
    task = TokenizerTask(config, one_device())
    if attention == (-1,):
        assert not changed(task.load(str(tmp_path / "x.safetensors")), tok.params)
    else:
        with pytest.raises(InputError, match=r"tokenizer\.attention_levels is \(0, 1\) there and \(1,\) here"):
            task.load(str(tmp_path / "x.safetensors"))
