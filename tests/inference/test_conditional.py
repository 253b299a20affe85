"""Tokenizers whose bridge has classes, beside an independent PyTorch module with the published names and shapes."""

import functools
import shutil
import tempfile

import jax
import numpy as np
import pytest
import safetensors.numpy

from fvq_jax.inference import class_tables
from fvq_jax.inference.saved import load_params
from fvq_jax.inference.tokenizer import Tokenizer
from fvq_jax.interop.named_tensors import abstract_params
from fvq_jax.runtime.errors import InputError
from tests.helpers.golden_case import relative_error
from tests.helpers.random_tokenizer import random_tokenizer, tiny_net
from tests.helpers.slow_cases import slow

CLASSES = 5
CONFIG = {
    "ch": 32,
    "ch_mult": [1, 1],
    "num_res_blocks": 1,
    "z_channels": 16,
    "codebook_size": 64,
    "codebook_dim": 8,
    "bridge": "dit:QBridge-XS/2",
    "classes": CLASSES,
}
# What the published bridge keeps, for 64 codes of 8 channels in patches of 2 x 2, width 32 and 5 classes.
BRIDGE_SHAPES = {
    "pos_embed": (1, 16, 32),
    "x_embedder.proj.weight": (32, 8, 2, 2),
    "x_embedder.proj.bias": (32,),
    "y_embedder.embedding_table.weight": (CLASSES + 1, 32),
    **{
        f"blocks.{i}.{name}": shape
        for i in range(2)
        for name, shape in {
            "attn.qkv.weight": (96, 32),
            "attn.qkv.bias": (96,),
            "attn.proj.weight": (32, 32),
            "attn.proj.bias": (32,),
            "mlp.fc1.weight": (64, 32),
            "mlp.fc1.bias": (64,),
            "mlp.fc2.weight": (32, 64),
            "mlp.fc2.bias": (32,),
            "adaLN_modulation.1.weight": (192, 32),
            "adaLN_modulation.1.bias": (192,),
        }.items()
    },
    "final_layer.linear.weight": (32, 32),
    "final_layer.linear.bias": (32,),
    "final_layer.adaLN_modulation.1.weight": (64, 32),
    "final_layer.adaLN_modulation.1.bias": (64,),
}
LABELS = np.array([3, 0, 3, 4, 1, 0, 3])


@functools.cache
def module(l2_norm=False):
    """The PyTorch module with random weights, and its tensors."""
    torch = pytest.importorskip("torch")
    from tests.helpers import torch_reference

    torch.manual_seed(1)
    net = torch_reference.Tokenizer({**CONFIG, "l2_norm": l2_norm})
    with torch.no_grad():
        net.quantize.qbridge.pos_embed.normal_()
        net.quant_conv.weight.mul_(8)
    return net, {key: value.numpy().copy() for key, value in net.state_dict().items()}


@functools.cache
def loaded(l2_norm=False):
    """The tokenizer that is read from the tensors of `module`."""
    folder = tempfile.mkdtemp()
    try:
        safetensors.numpy.save_file(module(l2_norm)[1], f"{folder}/x.safetensors")
        return Tokenizer.from_pretrained(f"{folder}/x.safetensors", l2_norm=l2_norm)
    finally:
        shutil.rmtree(folder)


@functools.cache
def tokenizer(classes=CLASSES):
    return Tokenizer(random_tokenizer(bridge=f"dit-XS/2-c{classes}"))


def pictures(n, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (n, 8, 8, 3)).astype(np.float32)


def as_numbers(labels, rows):
    return [CLASSES] * rows if isinstance(labels, str) else labels


def test_the_tensors_are_those_of_the_published_layout():
    tensors = module()[1]
    prefix = "quantize.qbridge."
    found = {key.removeprefix(prefix): value.shape for key, value in tensors.items() if key.startswith(prefix)}
    assert found == BRIDGE_SHAPES
    assert loaded().trained_net.quantizer.bridge == f"dit-XS/2-c{CLASSES}"
    assert loaded().classes == CLASSES
    assert f"bridge dit-XS/2-c{CLASSES}" in repr(loaded())


@pytest.mark.parametrize("l2_norm", [False, *slow(True)])
def test_folded_tables_equal_those_of_the_module(l2_norm):
    net, tables = module(l2_norm)[0], []
    for condition in (0, 3, np.int64(4), "null"):
        number = CLASSES if condition == "null" else int(condition)
        expected = net.quantize.table(number).detach().numpy()
        tables.append(loaded(l2_norm).table(condition))
        assert relative_error(tables[-1], expected) < 1e-4
    assert all(relative_error(table, tables[0]) > 1e-2 for table in tables[1:])


@pytest.mark.parametrize("l2_norm", [False, *slow(True)])
@pytest.mark.parametrize("labels", [LABELS, "null"], ids=["labels", "null"])
def test_codes_and_pictures_equal_those_of_the_module(labels, l2_norm):
    import torch

    net, tok, images = module(l2_norm)[0], loaded(l2_norm), pictures(len(LABELS))
    codes = tok.encode(images, labels)
    decoded = tok.decode(codes, labels)
    assert codes.dtype == np.int32
    assert decoded.dtype == np.float32
    for i, number in enumerate(as_numbers(labels, len(images))):
        with torch.no_grad():
            output = net(torch.from_numpy(np.moveaxis(images[i : i + 1], -1, 1).copy()), label=(int(number),))
        np.testing.assert_array_equal(codes[i].reshape(1, -1), output.indices)
        expected = np.moveaxis(output.reconstruction.clip(-1, 1).numpy()[0], 0, -1)
        assert relative_error(decoded[i], expected) < 1e-4
    assert len(np.unique(codes)) > 8


def test_the_label_decides_and_a_batch_is_only_a_matter_of_speed():
    tok, images = tokenizer(), pictures(3)
    codes = {label: tok.encode(images, [label] * 3) for label in range(CLASSES)}
    codes["null"] = tok.encode(images, "null")
    assert len({value.tobytes() for value in codes.values()}) == CLASSES + 1
    mixed = tok.encode(images, [4, 0, 2])
    np.testing.assert_array_equal(mixed, [codes[4][0], codes[0][1], codes[2][2]])
    assert np.abs(tok.decode(mixed, [4, 0, 2]) - tok.decode(mixed, [4, 0, 1])).max(axis=(1, 2, 3)).tolist()[:2] == [
        0,
        0,
    ]
    assert np.abs(tok.decode(mixed, [4, 0, 2]) - tok.decode(mixed, [4, 0, 1]))[2].max() > 1e-2
    assert tok.encode(images[:0], []).shape == (0, 4, 4)
    assert tok.decode(mixed[:0], "null").shape == (0, 8, 8, 3)


def test_the_networks_run_once_on_a_batch_of_many_classes():
    tok = Tokenizer(random_tokenizer(bridge=f"dit-XS/2-c{CLASSES}"))
    parts = []
    latents, search = tok._latents, tok._search
    tok._latents = lambda params, rows: parts.append(("latents", len(rows))) or latents(params, rows)
    tok._search = lambda params, rows: parts.append(("search", len(rows))) or search(params, rows)
    tok.encode(pictures(16), [0, 1, 2, 3] * 4)
    assert parts == [("latents", 16)] + 4 * [("search", 8)]


def test_only_the_last_tables_are_kept(monkeypatch):
    monkeypatch.setattr(class_tables, "KEPT_BYTES", 2 * 64 * 8 * 4 + 100)
    tok = Tokenizer(random_tokenizer(bridge="dit-XS/2-c40"))
    folded = []
    fold = tok._tables._fold
    tok._tables._fold = lambda params, number: folded.append(int(number)) or fold(params, number)

    def tables_on_devices():
        return sum(array.shape == (64, 8) for array in jax.live_arrays())

    before = tables_on_devices()  # among them the codebook itself
    tok.encode(pictures(12), list(range(12)))
    assert folded == list(range(12))
    assert tables_on_devices() <= before + 2
    codes = tok.encode(pictures(4), [11, 10, 11, 10])
    assert folded == list(range(12))
    tok.decode(codes, [11, 10, 11, 3])
    assert folded == [*range(12), 3]  # after those that are there
    tok.table(11)
    tok.table(10)
    assert folded == [*range(12), 3, 10]  # 3 had replaced 10, which was used before 11
    assert fold._cache_size() == 1


def test_the_memory_of_a_fold_does_not_depend_on_the_number_of_classes():
    temporary = []
    for classes in (1, 400):
        quantizer = tiny_net(bridge=f"dit-XS/2-c{classes}").quantizer
        params = abstract_params(tiny_net(bridge=f"dit-XS/2-c{classes}"))["quantizer"]
        fold = jax.jit(lambda params, number, q=quantizer: q.apply({"params": params}, number, method="table"))
        compiled = fold.lower(params, jax.ShapeDtypeStruct((), np.int32)).compile().memory_analysis()
        assert compiled.output_size_in_bytes == 64 * 8 * 4
        temporary.append(compiled.temp_size_in_bytes)
    assert temporary[1] < 1.1 * temporary[0]


@pytest.mark.parametrize("name", ["out", "out.safetensors", "out.pt"])
def test_saved_and_loaded_it_is_the_same_bit_for_bit(name, tmp_path):
    tok, tensors = loaded(), module()[1]
    tok.save_pretrained(tmp_path / name, None if name == "out" else "fvq")
    back = Tokenizer.from_pretrained(tmp_path / name)
    assert back.trained_net == tok.trained_net
    jax.tree.map(np.testing.assert_array_equal, back.trained_params, tok.trained_params)
    np.testing.assert_array_equal(back.encode(pictures(7), LABELS), tok.encode(pictures(7), LABELS))
    if name == "out":
        weights = safetensors.numpy.load_file(tmp_path / name / "weights.safetensors")
        assert not [key for key in weights if key.startswith("quantizer/")]
        return
    if name == "out.pt":
        import torch

        saved = torch.load(tmp_path / name, weights_only=True)["model"]
        module()[0].load_state_dict(saved, strict=True)
        saved = {key: value.numpy() for key, value in saved.items()}
    else:
        saved = safetensors.numpy.load_file(tmp_path / name)
    assert saved.keys() == tensors.keys()
    for key, value in tensors.items():
        np.testing.assert_array_equal(saved[key], value, err_msg=key, strict=True)


@pytest.mark.parametrize("condition", [2, "null"])
def test_llamagen_holds_the_table_of_one_class(condition, tmp_path):
    tok = tokenizer()
    tok.save_pretrained(tmp_path / "x.safetensors", layout="llamagen", condition=condition)
    plain = Tokenizer.from_pretrained(tmp_path / "x.safetensors")
    assert plain.classes == 0
    assert plain.trained_net.quantizer.bridge == "none"
    np.testing.assert_array_equal(plain.codebook, tok.table(condition))
    labels = condition if condition == "null" else [condition] * 3
    np.testing.assert_array_equal(plain.encode(pictures(3)), tok.encode(pictures(3), labels))
    codes = plain.encode(pictures(3))
    np.testing.assert_allclose(plain.decode(codes), tok.decode(codes, labels), atol=1e-5)


def test_a_folder_without_its_bridge_is_refused(tmp_path):
    tokenizer().save_pretrained(tmp_path)
    (tmp_path / "bridge.safetensors").unlink()
    with pytest.raises(
        InputError, match=r"bridge\.safetensors is missing: a tokenizer with a table per class needs it$"
    ):
        Tokenizer.from_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"holds another network: .*bridge is 'dit-XS/2-c5' there and 'dit-XS/2' here"):
        load_params(tmp_path, tiny_net(bridge="dit-XS/2"))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, r"a table for each of 5 classes: give labels, one for every row in 0\.\.4, or \"null\" for no class$"),
        ("none", r"name one by a label in 0\.\.4, or \"null\" for no class, not 'none'$"),
        ([0, 1], r"whole numbers \[3\], one for every row, or \"null\", not int64 \[2\]$"),
        (np.asarray(1), r"whole numbers \[3\], .*not int64 \[\]$"),
        ([0.0, 1.0, 2.0], r"whole numbers \[3\], .*not float64 \[3\]$"),
        ([0, 1, 5], r"in 0\.\.4, and these are from 0 to 5 \(\"null\" stands for no class\)$"),
        ([0, -1, 1], r"in 0\.\.4, and these are from -1 to 1"),
    ],
)
def test_labels_that_do_not_fit_are_refused_in_one_line(labels, message):
    for call in (lambda: tokenizer().encode(pictures(3), labels), lambda: tokenizer().decode(CODES, labels)):
        with pytest.raises(InputError, match=message) as error:
            call()
        assert "\n" not in str(error.value)


CODES = np.zeros((3, 4, 4), np.int32)


def test_conditions_that_do_not_fit_are_refused_in_one_line(tmp_path):
    for condition in (None, 5, -1, True, "label"):
        with pytest.raises(InputError, match=rf"name one by a label in 0\.\.4, .*, not {condition!r}$"):
            tokenizer().table(condition)
        with pytest.raises(
            InputError, match=r"(give condition,|name one by) a label in 0\.\.4, or \"null\" for no class"
        ):
            tokenizer().save_pretrained(tmp_path / "x.pt", "llamagen", condition=condition)
    with pytest.raises(InputError, match=r"no single one: use table\(label\) or table\(\"null\"\)$"):
        _ = tokenizer().codebook
    for layout, name in ((None, "x"), ("fvq", "x.pt")):
        with pytest.raises(InputError, match=r"condition is for a layout without bridge.* of a tokenizer with classes"):
            tokenizer().save_pretrained(tmp_path / name, layout, condition=1)
    assert not list(tmp_path.iterdir())


def test_without_classes_there_is_nothing_to_choose(tmp_path):
    tok = Tokenizer(random_tokenizer(bridge="dit-XS/2"))
    assert tok.classes == 0
    np.testing.assert_array_equal(tok.table(), tok.codebook)
    for call in (lambda: tok.encode(pictures(3), [0, 0, 0]), lambda: tok.decode(CODES, "null")):
        with pytest.raises(InputError, match=r"a single table and no classes: leave labels out$"):
            call()
    with pytest.raises(InputError, match=r"a single table and no classes: leave condition out$"):
        tok.table("null")
    with pytest.raises(InputError, match=r"condition is for a layout without bridge.* of a tokenizer with classes"):
        tok.save_pretrained(tmp_path / "x.pt", "llamagen", condition="null")
