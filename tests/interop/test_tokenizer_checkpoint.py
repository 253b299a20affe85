import argparse
import builtins
import logging

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from fvq_jax.interop import tokenizer_checkpoint
from fvq_jax.interop.layouts.fvq import FVQ
from fvq_jax.interop.tokenizer_checkpoint import write_checkpoint
from fvq_jax.runtime.errors import InputError
from fvq_jax.runtime.names import flatten
from tests.helpers.golden_case import load_case
from tests.helpers.random_tokenizer import random_tokenizer, tiny_net
from tests.helpers.slow_cases import slow


@pytest.fixture(scope="module")
def saved():
    return random_tokenizer(bridge="XS/2")


def published(saved, buffer=True):
    """The tensors of a published checkpoint."""
    tensors = {key: np.ascontiguousarray(value) for key, value in FVQ.tensors(saved.net, saved.params).items()}
    return tensors | ({"quantize.codebook_used": np.arange(65536, dtype=np.float32)} if buffer else {})


def read_checkpoint(path, **options):
    """The network and its parameters."""
    return tokenizer_checkpoint.read_checkpoint(path, **options)[1:]


def assert_same_params(actual, expected):
    actual, expected = flatten(actual), flatten(expected)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(actual[name], value, err_msg=name, strict=True)


def to_torch(tree):
    torch = pytest.importorskip("torch")
    if isinstance(tree, dict):
        return {key: to_torch(value) for key, value in tree.items()}
    return torch.from_numpy(np.array(tree)) if isinstance(tree, np.ndarray) else tree


def other(weights):
    return {key: value + 1 for key, value in weights.items()}


WRAPPERS = {
    "bare": lambda w: w,
    "model": lambda w: {"model": w, "steps": 7},
    "state_dict": lambda w: {"epoch": 3, "state_dict": w},
    "ema": lambda w: {"model": other(w), "ema": w},
    "ema_first": lambda w: {"ema": w, "model": other(w)},
    "no_ema": lambda w: {"model": w, "ema": None},
    "module": lambda w: {"model": {f"module.{key}": value for key, value in w.items()}},
    "compiled": lambda w: {f"_orig_mod.{key}": value for key, value in w.items()},
    "both": lambda w: {"ema": {f"module._orig_mod.{key}": value for key, value in w.items()}, "model": other(w)},
    "training": lambda w: {
        "model": w,
        "discriminator": {"main.0.weight": np.zeros((4, 3, 4, 4), np.float32)},
        "optimizer": {"state": {0: {"exp_avg": np.zeros(3, np.float32)}}, "param_groups": [{"lr": 1e-4}]},
    },
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_and_prefixes_are_taken_off(wrapper, saved, tmp_path):
    torch = pytest.importorskip("torch")
    torch.save(to_torch(WRAPPERS[wrapper](published(saved))), tmp_path / "x.pt")
    net, params = read_checkpoint(tmp_path / "x.pt")
    assert net == saved.net
    assert_same_params(params, saved.params)


@pytest.mark.parametrize("prefix", ["", "model.", "ema.module."])
def test_a_safetensors_file_needs_nothing_but_the_keys(prefix, saved, tmp_path):
    tensors = {prefix + key: value for key, value in published(saved, buffer=False).items()}
    if "ema" in prefix:
        tensors |= {f"model.{key}": value for key, value in other(published(saved)).items()}
    safetensors.numpy.save_file(tensors, tmp_path / "x.safetensors")
    net, params = read_checkpoint(tmp_path / "x.safetensors")
    assert net == saved.net
    assert_same_params(params, saved.params)


@pytest.mark.parametrize("prefix", ["", "first_stage.", "encoder.vae."])
@pytest.mark.parametrize("other", ["text.encoder.layers.", "ema.text.encoder.layers.", "unet.decoder.blocks."])
def test_a_larger_network_beside_it_is_left_alone(prefix, other, saved, tmp_path):
    tensors = {prefix + key: value for key, value in published(saved, buffer=False).items()}
    tensors |= {f"{other}{i}.weight": np.zeros(1, np.float32) for i in range(2 * len(tensors))}
    safetensors.numpy.save_file(tensors, tmp_path / "x.safetensors")
    if not prefix:  # nothing says which names are the tokenizer's
        with pytest.raises(InputError, match=r"extra: .*layers|extra: .*blocks"):
            read_checkpoint(tmp_path / "x.safetensors")
        return
    net, params = read_checkpoint(tmp_path / "x.safetensors")
    assert net == saved.net
    assert_same_params(params, saved.params)


@pytest.mark.parametrize("value", [True, False])
def test_l2_norm_comes_from_args_unless_it_is_given(value, tmp_path, caplog):
    torch = pytest.importorskip("torch")
    weights = to_torch(published(random_tokenizer(l2_normalize=True)))
    path = tmp_path / "x.pt"
    for args in (argparse.Namespace(codebook_l2_norm=value, lr=1e-4), {"l2_norm": value}):
        torch.save({"model": weights, "args": args}, path)
        assert read_checkpoint(path)[0].quantizer.l2_normalize is value
        assert read_checkpoint(path, l2_norm=not value)[0].quantizer.l2_normalize is not value
    assert not caplog.records
    torch.save({"model": weights, "args": argparse.Namespace(lr=1e-4)}, path)
    with caplog.at_level(logging.WARNING):
        assert read_checkpoint(path)[0].quantizer.l2_normalize is False
    assert "pass l2_norm=True" in caplog.text


def test_half_precision_is_read_as_float32(saved, tmp_path):
    torch = pytest.importorskip("torch")
    weights = {key: value.bfloat16() for key, value in to_torch(published(saved)).items()}
    torch.save({"model": weights}, tmp_path / "x.pt")
    _, params = read_checkpoint(tmp_path / "x.pt")
    kernel = params["quant_conv"]["conv"]["kernel"]
    assert kernel.dtype == np.float32
    np.testing.assert_allclose(kernel, saved.params["quant_conv"]["conv"]["kernel"], rtol=4e-3)


@pytest.mark.parametrize("ending", ["pt", *slow("safetensors", "pth")])
@pytest.mark.parametrize("case", ["fvq_vit", "fvq_dit", "fvq_linear", "llamagen_l2"])
def test_from_published_to_published_is_bit_exact(case, ending, tmp_path):
    torch = pytest.importorskip("torch")
    case = load_case(case)
    torch.save({"model": to_torch(case.weights), "args": argparse.Namespace(**case.config)}, tmp_path / "in.pt")
    net, params = read_checkpoint(tmp_path / "in.pt")
    assert net.quantizer.l2_normalize == case.config["l2_norm"]
    path = tmp_path / f"out.{ending}"
    write_checkpoint(path, "fvq", net, params)
    if ending == "safetensors":
        tensors = safetensors.numpy.load_file(path)
    else:
        tensors = {key: value.numpy() for key, value in torch.load(path, weights_only=True)["model"].items()}
    assert tensors.keys() == case.weights.keys()
    assert not np.any(tensors["quantize.codebook_used"])
    for key, value in case.weights.items():
        np.testing.assert_array_equal(tensors[key], value, err_msg=key, strict=True)
    again, params_again = read_checkpoint(path)
    assert again == net
    assert_same_params(params_again, params)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(["in.pt", path.name])


@pytest.mark.parametrize(
    ("bridge", "codes", "size"),
    [("none", 64, 65536), ("XS/2", 64, 65536), ("none", 65536, 65536), ("XS/8", 65536, 65537)],
)
def test_the_usage_buffer_is_as_long_as_in_the_published_quantizer(bridge, codes, size, tmp_path):
    big = random_tokenizer(bridge=bridge, codebook_size=codes, ch_mult=(1,))
    write_checkpoint(tmp_path / "x.safetensors", "fvq", big.net, big.params)
    tensors = safetensors.numpy.load_file(tmp_path / "x.safetensors")
    np.testing.assert_array_equal(tensors["quantize.codebook_used"], np.zeros(size, np.float32), strict=True)
    assert read_checkpoint(tmp_path / "x.safetensors", l2_norm=False)[0] == big.net


def test_without_pytorch_only_pt_files_cannot_be_written(saved, tmp_path, monkeypatch):
    imported = builtins.__import__

    def without_torch(name, *args, **kwargs):
        if name == "torch":
            raise ImportError(name)
        return imported(name, *args, **kwargs)

    torch = pytest.importorskip("torch")
    torch.save({"model": to_torch(published(saved))}, tmp_path / "x.pt")
    monkeypatch.setattr(builtins, "__import__", without_torch)
    net, params = read_checkpoint(tmp_path / "x.pt")
    write_checkpoint(tmp_path / "x.safetensors", "fvq", net, params)
    read_checkpoint(tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=r"needs PyTorch.*pip install torch --index-url \S+/cpu .*\.safetensors"):
        write_checkpoint(tmp_path / "y.pt", "fvq", net, params)
    assert not (tmp_path / "y.pt").exists()


def test_bad_files_are_refused_in_one_line(saved, tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"model": to_torch(published(saved))}, tmp_path / "x.pt")
    safetensors.numpy.save_file(published(saved), tmp_path / "x.safetensors")
    for name in ("x.pt", "x.safetensors"):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(InputError, match=f"{name} is damaged") as error:
            read_checkpoint(path)
        assert "\n" not in str(error.value)
    safetensors.numpy.save_file({"features.0.weight": np.zeros((2, 2))}, tmp_path / "vgg.safetensors")
    with pytest.raises(
        InputError, match=r"vgg\.safetensors is in none of the layouts.* nor like one: .* are features\.0\.weight$"
    ):
        read_checkpoint(tmp_path / "vgg.safetensors")
    tensors = published(saved)
    del tensors["decoder.conv_in.bias"]
    safetensors.numpy.save_file(tensors, tmp_path / "part.safetensors")
    with pytest.raises(InputError, match=r"part\.safetensors does not hold.*1 tensor missing: decoder\.conv_in\.bias$"):
        read_checkpoint(tmp_path / "part.safetensors")


def test_what_cannot_be_written_is_refused_in_one_line(saved, tmp_path):
    with pytest.raises(InputError, match=r"must end in one of \.safetensors, \.pt, \.pth"):
        write_checkpoint(tmp_path / "x.bin", "fvq", saved.net, saved.params)
    with pytest.raises(InputError, match='layout "fvq" holds bridges over 2d patches only'):
        write_checkpoint(tmp_path / "x.pt", "fvq", tiny_net(bridge="XS/2", bridge_groups="1d"), saved.params)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write .*file/x\.safetensors"):
        write_checkpoint(tmp_path / "file" / "x.safetensors", "fvq", saved.net, saved.params)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_the_names_of_the_tensors_go_by(ending, saved, tmp_path):
    pytest.importorskip("torch")
    path = tmp_path / f"x.{ending}"
    write_checkpoint(path, "fvq", saved.net, saved.params)
    seen = []

    def track(names):
        for name in names:
            seen.append(name)
            yield name

    read_checkpoint(path, track=track)
    assert sorted(seen) == sorted(published(saved, buffer=ending == "safetensors"))
