"""Files as published programs write them, with random weights, against independent PyTorch modules."""

import functools

import jax
import numpy as np
import pytest
import safetensors.numpy

from fvq_jax.inference.tokenizer import Tokenizer
from fvq_jax.interop.layouts import LAYOUTS
from fvq_jax.interop.layouts.var import VAR as VAR_LAYOUT
from fvq_jax.interop.tokenizer_checkpoint import read_checkpoint, write_checkpoint
from fvq_jax.runtime.errors import InputError
from tests.helpers.golden_case import load_case
from tests.helpers.random_tokenizer import random_tokenizer

torch = pytest.importorskip("torch")

from tests.helpers import torch_vqgan  # noqa: E402

COMMON = {"ch": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "z_channels": 16, "codes": 64, "dim": 8}
VAR = {"kind": "var", "fused": True, "kernel": 3, "scales": (1, 2, 3, 4), "dim": 16}
CONFIGS = {
    "taming": {"kind": "taming", "num_res_blocks": 2, "attention": [1]},
    "ibq": {"kind": "ibq", "ch_mult": (2, 1, 1)},
    "rq_vae": {"kind": "rq_vae", "depth": 3},
    "rq_vae of own books": {"kind": "rq_vae", "depth": 3, "own": True},
    "var": VAR,
    "fvq_var": {**VAR, "bridge": "vit:QBridge-XS/2"},
    "lfq": {"kind": "lfq", "z_channels": 6},
}


@functools.cache
def module(name):
    """The module of a layout with random weights, whose codes are spread like the latents."""
    torch.manual_seed(5)
    net = torch_vqgan.Tokenizer(COMMON | CONFIGS[name]).eval()
    with torch.no_grad():
        for key, value in net.named_parameters():
            if "norm" in key:
                value += 0.1 * torch.randn_like(value)
            if "embedding" in key or "codebooks" in key:
                value *= 0.5
        if name == "lfq":  # some signs of every channel differ
            net.encoder.conv_out.bias -= net.encoder(pictures(name)).mean((0, 2, 3))
        if CONFIGS[name]["kind"] in ("taming", "ibq"):
            latents = net.latents(pictures(name))
            book = net.quantize.embedding.weight
            book.copy_(latents.mean((0, 2, 3)) + latents.std((0, 2, 3)) * torch.randn_like(book))
    return net


def pictures(name):
    """Images [2, 3, H, W] that a module takes."""
    side = 4 * 2 ** (len((COMMON | CONFIGS[name])["ch_mult"]) - 1)
    return torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (2, 3, side, side)).astype(np.float32))


@functools.cache
def expected(name):
    """Images [b, H, W, 3], and what the module makes of them: pixels and codes."""
    with torch.no_grad():
        pixels, codes = module(name)(pictures(name))
    return *(np.moveaxis(array.numpy(), 1, -1) for array in (pictures(name), pixels)), codes.numpy()


def lightning(weights):
    """A checkpoint of the training program: loss, optimizer and settings beside the weights."""
    loss = {
        "loss.discriminator.main.0.weight": torch.ones(4, 3, 4, 4),
        "loss.perceptual_loss.lin0.model.1.weight": torch.ones(1),
    }
    return {
        "epoch": 3,
        "global_step": 100,
        "state_dict": weights | loss,
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4}]}],
    }


def averaged(weights):
    """Weights that are not those to be used, and their moving average, which is."""
    return {key: value + 1 for key, value in weights.items()} | {
        **{f"model_ema.{key.replace('.', '')}": value for key, value in weights.items()},
        "model_ema.decay": torch.tensor(0.999),
        "model_ema.num_updates": torch.tensor(-1, dtype=torch.int32),
        "model_ema.lossdiscriminatormain0weight": torch.ones(4, 3, 4, 4),
    }


FILES = {
    "taming": lightning,
    "ibq": lambda weights: lightning(averaged(weights)),
    "rq_vae": lambda weights: {"epoch": 1, "state_dict": weights, "optimizer": {"state": {}}},
    "var": lambda weights: weights,
    "fvq_var": lambda weights: {"model": weights, "steps": 5},
    "lfq": lambda weights: lightning(averaged(weights)),
}


def layout_of(name):
    return name.partition(" ")[0]


@functools.cache
def loaded(name, folder):
    """The tokenizer of a layout, read from a file in `folder`."""
    path = folder / f"{name}.ckpt"
    torch.save(FILES[layout_of(name)](dict(module(name).state_dict())), path)
    said = {"scales": VAR["scales"]} if "scales" in CONFIGS[name] else {}
    return Tokenizer.from_pretrained(path, **said, layout="lfq" if name == "lfq" else None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("published")


@pytest.mark.parametrize("name", CONFIGS)
def test_codes_and_pixels_are_those_of_the_module(name, folder):
    tok = loaded(name, folder)
    images, pixels, codes = expected(name)
    assert len(np.unique(codes)) > 8
    found = tok.encode(images)
    np.testing.assert_array_equal(found, codes)
    np.testing.assert_allclose(tok.decode(found), np.clip(pixels, -1, 1), atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_written_back_bit_for_bit(name, folder, tmp_path):
    loaded(name, folder).save_pretrained(tmp_path / "x.safetensors", layout=layout_of(name))
    weights = module(name).state_dict()
    tensors = safetensors.numpy.load_file(tmp_path / "x.safetensors")
    assert tensors.keys() - {key for key in tensors if key.startswith("model_ema.")} == weights.keys()
    for key, value in weights.items():
        if "_ema" not in key or layout_of(name) != "rq_vae":
            np.testing.assert_array_equal(tensors[key], value.numpy(), err_msg=key, strict=True)
    again = Tokenizer.from_pretrained(tmp_path / "x.safetensors")  # which says its scales itself
    assert again.net == loaded(name, folder).net


@pytest.mark.parametrize("name", CONFIGS)
def test_the_published_program_can_load_what_is_written(name, folder, tmp_path):
    loaded(name, folder).save_pretrained(tmp_path / "x.ckpt", layout=layout_of(name))
    content = torch.load(tmp_path / "x.ckpt", weights_only=True)
    weights = content if name == "var" else content["model" if name == "fvq_var" else "state_dict"]
    weights = {key: value for key, value in weights.items() if not key.startswith("model_ema.")}
    torch_vqgan.Tokenizer(COMMON | CONFIGS[name]).load_state_dict(weights)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "ibq",
            {"model_ema.quant_convbias": None},
            r"of some weights only: it lacks model_ema\.quant_convbias$",
        ),
        (
            "rq_vae",
            {"quantizer.codebooks.1.weight": torch.ones(64, 8)},
            r"1 tensor of another shape: quantizer\.codebooks\.1\.weight",
        ),
        ("fvq_var", {"decoder.mid.attn_1.qkv.bias": None}, r"1 tensor missing: decoder\.mid\.attn_1\.qkv\.bias$"),
        ("var", {}, r"has 4 scales, and 1 2 3 4 5 6 8 10 13 16 are 10: give scales=\(\.\.\.\)"),
        (
            "taming",
            {"quantize.used": torch.ones(3)},
            "is a VQGAN whose codes were renumbered, which does not exist here",
        ),
        (
            "taming",
            {"quantize.embedding.weight": None, "quantize.pos.weight": torch.ones(3)},
            r"in none of the layouts.*; closest is taming \(VQGAN of taming-transformers; (\d+) of \d+ tensors\): "
            r"it lacks quantize\.embedding\.weight and has quantize\.pos\.weight besides$",
        ),
        (
            "taming",
            {"quantize.embed.weight": torch.ones(3), "quantize.proj.bias": torch.ones(3)},
            "is a VQGAN with a Gumbel quantizer, which does not exist here",
        ),
        (
            "taming",
            {"encoder.mid_block.0.conv1.weight": torch.ones(3), "decoder.adaptive.0.gamma.bias": torch.ones(3)},
            'is an Open-MAGVIT2 tokenizer, whose networks do not exist here: .* as "lfq"$',
        ),
    ],
)
def test_what_is_not_exactly_such_a_file_is_refused_in_one_line(name, changes, message, tmp_path):
    weights = dict(module(name).state_dict())
    weights = averaged(weights) if name == "ibq" else weights
    weights = {key: value for key, value in (weights | changes).items() if value is not None}
    torch.save({"state_dict": weights}, tmp_path / "x.ckpt")
    with pytest.raises(InputError, match=message) as error:
        read_checkpoint(tmp_path / "x.ckpt", scales=VAR["scales"] if name == "fvq_var" else None)
    assert "\n" not in str(error.value)


def test_what_tensors_do_not_tell_is_said_by_the_name_of_the_layout(folder, tmp_path):
    """IBQ without moving average has the tensors of a VQGAN, FVQ's residual tokenizer those of FVQ."""
    torch.save(lightning(module("ibq").state_dict()), tmp_path / "x.ckpt")
    images, _, codes = expected("ibq")
    assert read_checkpoint(tmp_path / "x.ckpt")[0].name == "taming"
    tok = Tokenizer.from_pretrained(tmp_path / "x.ckpt", layout="ibq")
    np.testing.assert_array_equal(tok.encode(images), codes)
    weights = load_case("fvq_dit").weights
    safetensors.numpy.save_file(weights, tmp_path / "y.safetensors")
    layout, net, params = read_checkpoint(tmp_path / "y.safetensors", layout="fvq_rq")
    assert net.quantizer.description == "bridge dit-S/4, 4 levels"
    write_checkpoint(tmp_path / "z.safetensors", layout.name, net, params)
    assert read_checkpoint(tmp_path / "z.safetensors")[:2] == (layout, net)
    written = safetensors.numpy.load_file(tmp_path / "z.safetensors")
    assert written.keys() == weights.keys()
    for key, value in weights.items():
        np.testing.assert_array_equal(written[key], value, err_msg=key)
    with pytest.raises(InputError, match="there is no layout 'vqgan': use one of llamagen, fvq, fvq_rq"):
        read_checkpoint(tmp_path / "z.safetensors", layout="vqgan")
    for keyword, message in (({"scales": (1, 2)}, "with several scales"), ({"l2_norm": True}, "vector quantizer")):
        with pytest.raises(InputError, match=f"{message}, and .*z.safetensors is read as fvq_rq "):
            read_checkpoint(tmp_path / "z.safetensors", **keyword)


def test_a_layout_holds_only_what_its_program_has(folder, tmp_path):
    for name, layout, message in (
        (
            "taming",
            "ibq",
            'the layout "ibq" holds ibq quantizers only, and this one is vector: choose another',
        ),
        ("rq_vae of own books", "fvq_rq", 'the layout "fvq_rq" has one codebook for all levels, and these have codes'),
        ("var", "rq_vae", 'the layout "rq_vae" holds residual quantizers only, and this one is multi_scale'),
    ):
        with pytest.raises(InputError, match=message):
            loaded(name, folder).save_pretrained(tmp_path / "x.safetensors", layout=layout)
    unit = Tokenizer(random_tokenizer(l2_normalize=True))
    with pytest.raises(InputError, match='the layout "taming" has no codes of unit length'):
        unit.save_pretrained(tmp_path / "x.safetensors", layout="taming")
    with pytest.raises(InputError, match="as many channels in front of the quantizer's convolution as behind it"):
        VAR_LAYOUT.check(random_tokenizer().net, {})
    with pytest.raises(InputError, match=r'the layout "taming" has convolutions of side 1 .* tokenizer of 3'):
        LAYOUTS["taming"].tensors(random_tokenizer().net.clone(quant_kernel=3), {})
    saved = loaded("lfq", folder)
    moved = jax.tree.map(lambda leaf: leaf + 1, saved.params)
    with pytest.raises(InputError, match='the layout "lfq" has no convolutions beside its quantizer'):
        LAYOUTS["lfq"].tensors(saved.net, moved)
    assert not list(tmp_path.iterdir())


def test_attention_may_be_in_any_levels(folder, tmp_path):
    config = COMMON | {"kind": "taming", "ch_mult": (1, 1, 1), "attention": [0, 1]}
    torch.manual_seed(1)
    net = torch_vqgan.Tokenizer(config)
    torch.save(lightning(net.state_dict()), tmp_path / "x.ckpt")
    tok = Tokenizer.from_pretrained(tmp_path / "x.ckpt")
    assert tok.net.attention_levels == (0, 1)
    images = np.random.default_rng(0).uniform(-1, 1, (1, 8, 8, 3)).astype(np.float32)
    with torch.no_grad():
        pixels, codes = net(torch.from_numpy(np.moveaxis(images, -1, 1).copy()))
    np.testing.assert_array_equal(tok.encode(images), codes)
    np.testing.assert_allclose(tok.decode(codes.numpy()), np.moveaxis(pixels.numpy(), 1, -1).clip(-1, 1), atol=1e-4)
    tok.save_pretrained(tmp_path / "folder")
    assert Tokenizer.from_pretrained(tmp_path / "folder").net == tok.net
    with pytest.raises(InputError, match='the layout "llamagen" has attention in the lowest level only'):
        tok.save_pretrained(tmp_path / "y.safetensors", layout="llamagen")
