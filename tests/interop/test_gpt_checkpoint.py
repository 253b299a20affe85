import argparse
import functools
import types

import jax
import numpy as np
import pytest
import safetensors.numpy

from fvq_jax.interop.gpt_checkpoint import is_gpt_file, read_gpt, write_gpt
from fvq_jax.interop.gpt_layout import gpt_tensors, infer_gpt, torch_shapes
from fvq_jax.models.gpt import GPT, SIZES, hidden_width
from fvq_jax.runtime.errors import InputError
from fvq_jax.runtime.names import flatten
from tests.helpers.golden_case import load_case, relative_error

NET = GPT(vocab=24, classes=5, grid=(2, 3), layers=3, width=16, heads=2)
# Published: parameters of the models for 16,384 codes and 1,000 classes.
PUBLISHED = {"B": 110_888_448, "L": 342_910_976, "XL": 774_699_520, "XXL": 1_410_972_672, "3B": 3_096_659_200}


def random_gpt(net=NET, seed=0):
    """Random weights of the shapes that the module itself makes."""
    codes = jax.ShapeDtypeStruct((1, net.length), np.int32)
    abstract = jax.eval_shape(net.init, jax.random.key(0), jax.ShapeDtypeStruct((1,), np.int32), codes)["params"]
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda leaf: 0.2 * rng.standard_normal(leaf.shape, np.float32), abstract)
    if net.class_dropout == 0:
        params["cls_embedding"][-1] = 0
    return params


def inputs(net, seed=1):
    rng = np.random.default_rng(seed)
    return rng.integers(0, net.classes, 4), rng.integers(0, net.vocab, (4, net.length))


@functools.cache
def program(net):
    return jax.jit(lambda params, *batch: net.apply({"params": params}, *batch, method="logits"))


def logits(net, params, labels, codes):
    return np.asarray(program(net)(params, labels.astype(np.int32), codes.astype(np.int32)))


def torch_module(net):
    pytest.importorskip("torch")
    from tests.helpers import torch_gpt

    hidden = net.hidden or hidden_width(net.width)
    sizes = (net.vocab, net.classes, net.grid, net.layers, net.width, net.heads, hidden)
    return torch_gpt.GPT(*sizes, net.class_dropout > 0, net.rope_base, net.eps)


def torch_logits(module, labels, codes):
    import torch

    with torch.no_grad():
        return module(torch.from_numpy(labels), torch.from_numpy(codes)).numpy()


def saved(tensors, path, wrap=lambda weights: weights):
    torch = pytest.importorskip("torch")
    torch.save(wrap({name: torch.from_numpy(np.array(value)) for name, value in tensors.items()}), path)
    return path


def assert_same_params(actual, expected):
    actual, expected = flatten(actual), flatten(expected)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(actual[name], value, err_msg=name, strict=True)


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
@pytest.mark.parametrize("changes", [{}, {"class_dropout": 0.0, "grid": (4, 4), "hidden": 40, "eps": 1e-3}])
def test_what_is_written_loads_strictly_and_gives_the_same_logits(changes, ending, tmp_path):
    torch = pytest.importorskip("torch")
    net = NET.clone(**changes)
    params = random_gpt(net)
    path = tmp_path / f"x.{ending}"
    write_gpt(path, net, params)
    module = torch_module(net)
    if ending == "pt":
        tensors = torch.load(path, weights_only=True)["model"]
    else:
        tensors = {name: torch.from_numpy(value) for name, value in safetensors.numpy.load_file(path).items()}
    module.load_state_dict(tensors, strict=True)
    labels, codes = inputs(net)
    ours = logits(net, params, labels, codes)
    assert relative_error(torch_logits(module, labels, codes), ours) < 1e-5
    again, params_again = read_gpt(path)  # the file says all that tensors do not
    assert again == net
    assert_same_params(params_again, params)


WRAPPERS = {
    "bare": lambda w: w,
    "model": lambda w: {"model": w, "optimizer": {"state": {0: {"exp_avg": w["norm.weight"]}}}, "steps": 7},
    "module": lambda w: {"module": w, "optimizer": {"layers.0.ffn_norm.weight": {"exp_avg": w["norm.weight"]}}},
    "state_dict": lambda w: {"epoch": 3, "state_dict": w},
    "distributed": lambda w: {"model": {f"module.{name}": value for name, value in w.items()}},
    "compiled": lambda w: {f"_orig_mod.{name}": value for name, value in w.items()},
    "both": lambda w: {"state_dict": {f"module._orig_mod.{name}": value for name, value in w.items()}},
    "compiled_layers": lambda w: {name.replace("ffn", "_orig_mod.ffn"): value for name, value in w.items()},
    "ema_too": lambda w: {"ema": {name: value + 1 for name, value in w.items()}, "model": w},
    "only_ema": lambda w: {"ema": w},
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_every_wrapping_of_pytorch_weights_gives_their_logits(wrapper, tmp_path):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    module = torch_module(NET)
    weights = module.state_dict()
    computed = {"freqs_cis": torch.zeros(7, 4, 2), "causal_mask": torch.ones(7, 7, dtype=torch.bool)}
    computed |= {f"layers.0.attention.kv_cache.{name}_cache": torch.zeros(1, 2, 8, 8) for name in "kv"}
    torch.save(WRAPPERS[wrapper](weights | computed), tmp_path / "x.pt")
    net, params = read_gpt(tmp_path / "x.pt", heads=2, grid=(2, 3))
    assert net == NET
    labels, codes = inputs(net)
    assert relative_error(logits(net, params, labels, codes), torch_logits(module, labels, codes)) < 1e-5


@pytest.mark.parametrize("prefix", ["", "model.", "module."])
def test_the_golden_case_through_a_safetensors_file(prefix, tmp_path):
    case = load_case("llamagen_gpt")
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file({prefix + name: value for name, value in case.weights.items()}, path)
    assert is_gpt_file(path)
    net, params = read_gpt(path, heads=4, grid=(4, 4))
    assert (net.vocab, net.classes, net.hidden, net.class_dropout) == (128, 10, 0, 0.1)
    found = logits(net, params, case.inputs["labels"], case.inputs["indices"])
    assert relative_error(found, case.outputs["logits"]) < 1e-4


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_half_precision_is_read_as_float32(kind, ending, tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    params = random_gpt()
    weights = {name: torch.from_numpy(np.array(value)).to(getattr(torch, kind)) for name, value in flat(params).items()}
    path = tmp_path / f"x.{ending}"
    (torch.save if ending == "pt" else save_file)(weights, path)
    _, read = read_gpt(path, heads=2, grid=(2, 3))
    expected = gpt_tensors(NET, params)["layers.2.attention.wo.weight"]
    assert read["layers"]["wo"].dtype == np.float32
    np.testing.assert_allclose(read["layers"]["wo"][2].T, expected, rtol=4e-3, atol=1e-7)


def flat(params, net=NET):
    return {name: np.ascontiguousarray(value) for name, value in gpt_tensors(net, params).items()}


@pytest.mark.parametrize("size", SIZES)
def test_published_sizes_are_recognised_by_their_shapes(size):
    shape = SIZES[size]
    net = GPT(16384, 1000, (16, 16), shape.layers, shape.width, shape.heads)
    shapes = torch_shapes(net)
    assert sum(np.prod(shape, dtype=np.int64) for shape in shapes.values()) == PUBLISHED[size]
    tensors = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
    assert infer_gpt(tensors, {}, grid=(16, 16)) == net
    assert infer_gpt(tensors, {}, grid=(16, 16), heads=shape.heads // 2).heads == shape.heads // 2


def test_the_shapes_are_those_of_the_module():
    for net in (NET, NET.clone(hidden=40, class_dropout=0.0)):
        assert {name: value.shape for name, value in gpt_tensors(net, random_gpt(net)).items()} == torch_shapes(net)


ARGUMENTS = {
    "of_the_training_program": {"gpt_model": "GPT-B", "image_size": 48, "downsample_size": 16, "num_classes": 5},
    "of_the_model": {"block_size": 9, "n_head": 4, "rope_base": 500, "norm_eps": 1e-6},
    "of_this_package": {"grid": [1, 9], "n_head": 4, "block_size": 9},
    "unset": {"n_head": None, "block_size": None, "num_classes": None, "class_dropout_prob": None},
}


@pytest.mark.parametrize("kind", [dict, types.SimpleNamespace])
@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_in_the_file_are_read_and_keywords_come_first(name, kind, tmp_path):
    said = ARGUMENTS[name]
    args = argparse.Namespace(**said) if kind is types.SimpleNamespace else said
    path = saved(flat(random_gpt()), tmp_path / "x.pt", lambda weights: {"model": weights, "args": args})
    if name == "unset":
        with pytest.raises(InputError, match=r"heads=N, .* and grid=\(rows, columns\)"):
            read_gpt(path)
    given = {} if "n_head" in said and name != "unset" else {"heads": 2}
    given |= {"grid": (3, 2)} if name == "unset" else {}
    net, _ = read_gpt(path, **given)
    grids = {"of_this_package": (1, 9), "unset": (3, 2)}
    assert (net.heads, net.grid) == (given.get("heads", 4), grids.get(name, (3, 3)))
    assert (net.rope_base, net.eps) == ((500, 1e-6) if name == "of_the_model" else (10000, 1e-5))
    net, _ = read_gpt(path, heads=1, grid=(1, 2))
    assert (net.heads, net.grid) == (1, (1, 2))


@pytest.mark.parametrize(
    ("rows", "args", "keyword", "classes", "null"),
    [
        (6, {}, None, 5, True),
        (6, {}, 6, 6, False),
        (6, {"num_classes": 5}, None, 5, True),
        (6, {"num_classes": 6}, None, 6, False),
        (6, {"num_classes": 6}, 5, 5, True),
        (6, {"class_dropout_prob": 0.0}, None, 6, False),
        (6, {"class_dropout_prob": 0.3}, None, 5, True),
        (1000, {}, None, 1000, False),
        (1000, {"class_dropout_prob": 0.1}, None, 999, True),
        (1001, {}, None, 1000, True),
    ],
)
def test_a_table_without_a_row_for_no_class(rows, args, keyword, classes, null, tmp_path):
    tensors = flat(random_gpt()) | {
        "cls_embedding.embedding_table.weight": np.random.default_rng(0).standard_normal((rows, 16), np.float32)
    }
    path = saved(tensors, tmp_path / "x.pt", lambda weights: {"model": weights, "args": args})
    net, params = read_gpt(path, heads=2, grid=(2, 3), classes=keyword)
    assert (net.classes, net.class_dropout) == (classes, args.get("class_dropout_prob", 0.1) if null else 0)
    table = tensors["cls_embedding.embedding_table.weight"]
    np.testing.assert_array_equal(params["cls_embedding"][:rows], table)
    assert params["cls_embedding"].shape == (classes + 1, 16)
    assert np.any(params["cls_embedding"][-1]) == null


def changed(name, value):
    tensors = flat(random_gpt())
    if value is None:
        del tensors[name]
    else:
        tensors[name] = np.zeros(value, np.float32)
    return tensors


@pytest.mark.parametrize(
    ("tensors", "keywords", "message"),
    [
        (
            lambda: changed("layers.1.feed_forward.w2.weight", None),
            {},
            r"does not hold this generator: 1 tensor missing: layers\.1\.feed_forward\.w2\.weight$",
        ),
        (lambda: changed("tok_embeddings.bias", (3,)), {}, r"1 tensor extra: tok_embeddings\.bias$"),
        (
            lambda: changed("layers.0.attention.wqkv.weight", (16, 16)),
            {},
            r"of another shape: layers\.0\.attention\.wqkv\.weight \[16, 16\] instead of \[48, 16\]$",
        ),
        (lambda: changed("cls_embedding.embedding_table.weight", None), {}, r"it lacks cls_embedding\.embedding_table"),
        (lambda: changed("cls_embedding.uncond_embedding", (2, 16)), {}, r"text-conditional model \(t2i\)"),
        (
            lambda: {"features.0.weight": np.zeros((2, 2))},
            {},
            r"no class-conditional LlamaGen generator: it lacks",
        ),
        (
            lambda: flat(random_gpt()),
            {"heads": None},
            r"give heads=N, since 3 layers of width 16 are no",
        ),
        (lambda: flat(random_gpt()), {"grid": None}, r"give grid=\(rows, columns\) of codes, published: \(16, 16\)"),
        (lambda: flat(random_gpt()), {"heads": 3}, r"width 16, which 3 heads do not divide"),
        (lambda: flat(random_gpt()), {"heads": 0}, r"width 16, which 0 heads do not divide"),
        (lambda: flat(random_gpt()), {"grid": (0, 4)}, r"must be rows and columns of codes, not \(0, 4\)"),
        (lambda: flat(random_gpt()), {"classes": 9}, r"6 rows in its table of classes; 9 classes need 9, or 10 with"),
    ],
)
def test_what_is_no_generator_is_refused_in_one_line(tensors, keywords, message, tmp_path):
    safetensors.numpy.save_file(tensors(), tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=message) as error:
        read_gpt(tmp_path / "x.safetensors", **({"heads": 2, "grid": (2, 3)} | keywords))
    assert "\n" not in str(error.value)
    assert "x.safetensors" in str(error.value)


def test_a_number_of_codes_that_is_no_square_needs_a_grid(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file(flat(random_gpt()), path, {"block_size": "6"})
    with pytest.raises(InputError, match=r"6 codes, which are no square: give grid=\(rows, columns\)"):
        read_gpt(path, heads=2)
    assert read_gpt(path, heads=2, grid=(2, 3))[0] == NET


def test_damaged_files_and_bad_targets_are_refused_in_one_line(tmp_path):
    for path in (saved(flat(random_gpt()), tmp_path / "x.pt"), tmp_path / "x.safetensors"):
        write_gpt(path, NET, random_gpt())
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        for reader in (is_gpt_file, lambda path: read_gpt(path, heads=2, grid=(2, 3))):
            with pytest.raises(InputError, match=f"{path.name} is damaged"):
                reader(path)
        with pytest.raises(InputError, match="cannot read"):
            is_gpt_file(path.with_stem("nothing"))
    with pytest.raises(InputError, match=r"must end in one of \.safetensors, \.pt, \.pth"):
        write_gpt(tmp_path / "x.bin", NET, random_gpt())


def test_a_tokenizer_is_no_generator(tmp_path):
    safetensors.numpy.save_file(load_case("llamagen_l2").weights, tmp_path / "x.safetensors")
    assert not is_gpt_file(tmp_path / "x.safetensors")


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_the_names_of_the_tensors_go_by(ending, tmp_path):
    pytest.importorskip("torch")
    write_gpt(tmp_path / f"x.{ending}", NET, random_gpt())
    seen = []

    def track(names):
        for name in names:
            seen.append(name)
            yield name

    read_gpt(tmp_path / f"x.{ending}", track=track)
    assert sorted(seen) == sorted(torch_shapes(NET))
