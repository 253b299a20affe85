import functools
import json
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import fvq_jax
from fvq_jax.inference.generator import Generator
from fvq_jax.inference.saved import SavedTokenizer
from fvq_jax.inference.saved_generator import Provenance, load_generator
from fvq_jax.inference.tokenizer import Tokenizer
from fvq_jax.models.quantizers.residual import ResidualQuantizer
from fvq_jax.runtime.errors import InputError
from fvq_jax.training.checkpoint import Checkpoints
from fvq_jax.training.state import NetworkState, TrainState
from tests.helpers.golden_case import load_case, relative_error
from tests.helpers.random_generator import random_generator
from tests.helpers.random_tokenizer import random_tokenizer

DRAWN = {"guidance": 2.0, "temperature": 0.9, "top_k": 30, "top_p": 0.95}


@functools.cache
def tokenizer(**options):
    return Tokenizer(random_tokenizer(**options))


@functools.cache
def generator(**options):
    return Generator(random_generator(**options))


@functools.cache
def golden():
    return load_case("llamagen_gpt")


@pytest.fixture(scope="module")
def golden_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("golden") / "gpt.safetensors"
    safetensors.numpy.save_file(golden().weights, path)
    return path


@pytest.fixture(scope="module")
def from_file(golden_file):
    return fvq_jax.Generator.from_pretrained(golden_file, heads=4, grid=(4, 4), tokenizer=None)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_the_likeliest_codes_are_those_of_the_published_model(guidance, from_file):
    codes = from_file.sample_codes(golden().inputs["labels"], guidance=guidance, temperature=0)
    assert codes.dtype == np.int32
    np.testing.assert_array_equal(codes, golden().outputs[f"greedy_cfg{guidance}"].reshape(3, 4, 4))


def test_logits_and_likelihoods_are_those_of_the_published_model(from_file):
    labels, codes = golden().inputs["labels"], golden().inputs["indices"]
    logits = from_file.logits(labels, codes)
    assert logits.dtype == np.float32
    assert relative_error(logits, golden().outputs["logits"]) < 1e-5
    bits = from_file.nll_bits(labels, codes.reshape(3, 4, 4))
    assert bits.dtype == np.float32
    assert bits.shape == (3, 16)
    np.testing.assert_allclose(bits.mean() * np.log(2), golden().outputs["loss"], rtol=1e-5)
    shares = jax.nn.log_softmax(logits)
    np.testing.assert_allclose(bits, -np.take_along_axis(shares, codes[..., None], 2)[..., 0] / np.log(2), atol=1e-4)


def test_an_image_does_not_depend_on_the_others_in_its_batch():
    gen, labels = generator(), np.arange(21) % 11
    codes = gen.sample_codes(labels, seed=4, **DRAWN)
    assert codes.shape == (21, 4, 4)
    for some in ([20], [3, 17, 0]):
        np.testing.assert_array_equal(gen.sample_codes(labels[some], seed=4, numbers=some, **DRAWN), codes[some])
    assert len(np.unique(codes.reshape(21, -1), axis=0)) == 21
    other = gen.sample_codes(labels, seed=5, **DRAWN)
    assert (other != codes).mean() > 0.5
    same_label = gen.sample_codes([1, 1], seed=4, **DRAWN)
    assert (same_label[0] != same_label[1]).any()
    assert gen.sample_codes([], seed=4).shape == (0, 4, 4)


def test_few_programs_are_compiled_for_many_sizes_and_values():
    gen = generator()
    for count in (1, 8):
        for values in ({"guidance": 1.5}, {"guidance": 3.0, "schedule": "cosine"}, {"guidance": 2.0, "interval": 3}):
            gen.sample_codes(np.zeros(count, int), **values, top_k=count)
    (program,) = (found for kind, found in gen._samplers.items() if kind == (True, False, True, False))
    assert program._cache_size() == 1  # one image on each of the eight devices


def test_the_work_is_spread_over_the_devices_and_rows_of_an_image_stay_together():
    gen = generator()
    program = gen._sampler(True, True, False, False)
    settings = (np.uint32(0), np.full(16, 2.0, np.float32), np.float32(0), np.int32(0), np.float32(1))
    rows = jax.device_put([np.zeros(16, np.int32), np.arange(16, dtype=np.uint32)], gen._by_rows)
    compiled = program.lower(gen._weights, *settings, *rows).compile()
    (codes,) = jax.tree.leaves(compiled(gen._weights, *settings, *rows))
    assert [shard.data.shape for shard in codes.addressable_shards] == [(2, 16)] * 8
    for collective in ("all-reduce", "all-gather", "collective-permute", "all-to-all"):
        assert collective not in compiled.as_text()


@pytest.mark.parametrize(
    "option", [{"temperature": 3.0}, {"top_k": 2}, {"top_p": 0.3}, {"guidance": 5.0}, {"guidance": 5.0, "interval": 4}]
)
def test_every_option_changes_the_codes(option):
    gen, labels = generator(), np.arange(8)
    plain = gen.sample_codes(labels, guidance=1.0)
    assert (gen.sample_codes(labels, **{"guidance": 1.0} | option) != plain).any()


def test_schedules_change_the_codes_and_low_guidance_is_none():
    gen, labels = generator(), np.arange(8)
    found = [
        gen.sample_codes(labels, guidance=5.0, **options).tobytes()
        for options in ({}, {"schedule": "cosine"}, {"schedule": "cosine", "power": 3.0}, {"schedule": "linear"})
    ]
    assert len(set(found)) == 4
    np.testing.assert_array_equal(gen.sample_codes(labels, guidance=0.5), gen.sample_codes(labels, guidance=1))


def test_pictures_are_the_decoded_codes():
    gen = Generator(random_generator(), tokenizer())
    images = gen.sample([3, 10], seed=2)
    assert images.shape == (2, 8, 8, 3)
    assert images.dtype == np.float32
    np.testing.assert_array_equal(images, tokenizer().decode(gen.sample_codes([3, 10], seed=2)))


def test_bfloat16_is_what_it_computes_in():
    exact, rounded = generator(), Generator(random_generator(), dtype="bfloat16")
    labels, codes = np.arange(4), np.arange(64).reshape(4, 16)
    difference = relative_error(rounded.logits(labels, codes), exact.logits(labels, codes))
    assert 1e-4 < difference < 0.05
    assert rounded._weights["layers"][0]["wqkv"].dtype == jnp.bfloat16
    assert rounded.nll_bits(labels, codes).dtype == np.float32
    with pytest.raises(InputError, match="dtype must be one of float32, bfloat16, not float16"):
        Generator(random_generator(), dtype="float16")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda gen: gen.sample([1]), "there is no tokenizer to make pictures with: .*sample_codes"),
        (lambda gen: gen.sample_codes([11]), r"labels must be in 0\.\.10 \(10: no class\), .* from 11 to 11"),
        (lambda gen: gen.sample_codes([-1, 2]), r"labels must be in 0\.\.10 .* from -1 to 2"),
        (lambda gen: gen.sample_codes([0.5]), r"labels must be whole numbers \[b\], not float64 \[1\]"),
        (lambda gen: gen.sample_codes([[1]]), r"labels must be whole numbers \[b\], not int64 \[1, 1\]"),
        (lambda gen: gen.sample_codes([1], guidance=-1.0), "guidance must be 0 or more, not -1"),
        (lambda gen: gen.sample_codes([1], guidance=float("nan")), "guidance must be 0 or more, not nan"),
        (lambda gen: gen.sample_codes([1], temperature=-1.0), "temperature must be 0 or more"),
        (lambda gen: gen.sample_codes([1], top_k=-1), "top_k must be a whole number, 0"),
        (lambda gen: gen.sample_codes([1], top_p=0.0), "top_p must be above 0 and at most 1"),
        (lambda gen: gen.sample_codes([1], schedule="sine"), "schedule must be one of constant, cosine, linear"),
        (lambda gen: gen.sample_codes([1], interval=-2), "interval must be -1"),
        (lambda gen: gen.sample_codes([1], power=0.0), "power must be above 0"),
        (lambda gen: gen.sample_codes([1], seed=-1), r"seed must be in 0\.\.4294967295, not -1"),
        (lambda gen: gen.sample_codes([1], numbers=[1, 2]), r"numbers must be whole numbers \[1\], not int64 \[2\]"),
        (lambda gen: gen.sample_codes([1], numbers=[-1]), r"must be in 0\.\.4294967295, not -1 to -1"),
        (lambda gen: gen.logits([1], np.zeros((1, 15), int)), r"codes must be whole numbers \[1, 16\] or \[1, 4, 4\]"),
        (lambda gen: gen.logits([1, 2], np.zeros((1, 16), int)), r"as many rows as labels, not int64 \[1, 16\]"),
        (lambda gen: gen.nll_bits([1], np.full((1, 16), 64)), r"codes must be in 0\.\.63, .* from 64 to 64"),
        (lambda gen: gen.save_pretrained("x.pt"), "without a layout a folder is written, and x.pt is a file"),
        (lambda gen: gen.save_pretrained("x.pt", "fvq"), "unknown layout 'fvq': use layout='llamagen'"),
    ],
)
def test_bad_input_is_refused_in_one_line(call, message):
    with pytest.raises(InputError, match=message) as error:
        call(generator())
    assert "\n" not in str(error.value)


def test_guidance_needs_a_class_for_no_class():
    gen = generator(class_dropout=0.0)
    with pytest.raises(
        InputError, match=r"guidance=1.75 needs a model that knows pictures without a class.*guidance=1"
    ):
        gen.sample_codes([1])
    with pytest.raises(InputError, match=r"labels must be in 0\.\.9, and these are from 10 to 10"):
        gen.sample_codes([10], guidance=1.0)
    assert gen.sample_codes([1], guidance=1.0).shape == (1, 4, 4)


@pytest.mark.parametrize(
    ("provenance", "changes", "message"),
    [
        ({}, {"vocab": 65}, r"64 x 8 codes.* has 64 codes, and the generator 65"),
        (
            {"tokenizer": "0123456789abcdef"},
            {},
            r"codes of the tokenizer 0123456789abcdef, and this one is [0-9a-f]{16}",
        ),
        ({"image_size": 16}, {}, r"4 x 4 codes is 8 x 8 pixels of this tokenizer, and .* trained on 16 x 16"),
        ({"condition": "label"}, {}, r"condition='label', and the tokenizer has a single table"),
    ],
)
def test_a_tokenizer_that_does_not_belong_is_refused(provenance, changes, message):
    saved = random_generator(provenance=Provenance(**provenance), **changes)
    with pytest.raises(InputError, match=f"tokenizer and generator do not belong together: .*{message}"):
        Generator(saved, tokenizer())


def test_a_tokenizer_with_levels_is_refused():
    net = random_tokenizer().net
    quantizer = ResidualQuantizer(codebook_size=64, code_dim=8, bridge="none", depth=2)
    with_levels = Tokenizer(SavedTokenizer(net.clone(quantizer=quantizer), random_tokenizer().params))
    with pytest.raises(InputError, match=r"2 levels, .* has levels or scales, and a generator makes codes \[h, w\]"):
        Generator(random_generator(), with_levels)


def test_a_tokenizer_that_belongs_is_taken():
    found = tokenizer()
    known = Provenance(found.fingerprint, "none", 8)
    assert Generator(random_generator(provenance=known), found).tokenizer is found
    with pytest.raises(InputError, match="condition='label' is for a tokenizer with a table per class"):
        Generator(random_generator(), found).sample([1], condition="label")


class PerClass:
    """What a generator needs of a tokenizer with a table per class; pictures are the labels, -1 for "null"."""

    classes, fingerprint, downsampling = 10, "f" * 16, 2
    net = tokenizer().net

    def decode(self, codes, labels=None):
        numbers = [-1] * len(codes) if isinstance(labels, str) else labels
        return np.asarray(numbers, np.float32).reshape(-1, 1, 1, 1).repeat(3, axis=-1)


def test_codes_are_decoded_with_what_they_were_extracted_with():
    codes = np.zeros((2, 4, 4), int)

    def decoded(known, condition=None, labels=(3, 4)):
        gen = Generator(random_generator(provenance=Provenance(condition=known)))
        gen.tokenizer = PerClass()
        return gen.decode(codes, list(labels), condition=condition)[:, 0, 0, 0].tolist()

    assert decoded("label") == decoded("", "label") == [3, 4]
    assert decoded("null") == decoded("", "null") == [-1, -1]
    with pytest.raises(InputError, match="nothing says which one the generator's codes were extracted with"):
        decoded("")
    with pytest.raises(InputError, match=r"condition='null' does not fit: .* extracted with condition='label'"):
        decoded("label", "null")
    with pytest.raises(InputError, match="pictures without a class have no label to be decoded with"):
        decoded("label", labels=(3, 10))


@pytest.mark.parametrize(
    ("name", "layout"), [("folder", None), ("gpt.safetensors", "llamagen"), ("gpt.pt", "llamagen")]
)
def test_saved_and_loaded_it_draws_the_same(name, layout, tmp_path):
    if name.endswith(".pt"):
        pytest.importorskip("torch")
    known = Provenance("0123456789abcdef", "none", 8, tuple("abcdefghij"))
    gen = Generator(random_generator(provenance=known, eps=1e-4))
    gen.save_pretrained(tmp_path / name, layout)
    gen.save_pretrained(tmp_path / name, layout)  # again, over it
    back = Generator.from_pretrained(tmp_path / name)
    assert (back.net.grid, back.net.heads, back.net.eps) == ((4, 4), 4, 1e-4)
    assert back.provenance == (known if layout is None else Provenance())
    np.testing.assert_array_equal(back.sample_codes(np.arange(5)), gen.sample_codes(np.arange(5)))
    assert "64" in repr(back)


def test_pickled_it_draws_the_same():
    back = pickle.loads(pickle.dumps(Generator(random_generator(), tokenizer(), dtype="bfloat16")))
    assert back.net.dtype == jnp.bfloat16
    assert back.tokenizer.fingerprint == tokenizer().fingerprint
    again = pickle.loads(pickle.dumps(generator()))
    np.testing.assert_array_equal(again.sample_codes(np.arange(5)), generator().sample_codes(np.arange(5)))


def write_workdir(folder, params, ema):
    """What a training run leaves that a generator is loaded from."""
    network = NetworkState(jax.tree.map(jnp.asarray, params), {}, {})
    state = TrainState(jnp.int32(5), jnp.int32(0), {"generator": network}, jax.tree.map(jnp.asarray, ema))
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(state, 5, {})
    fields = {"vocab": 64, "classes": 10, "grid": [4, 4], "layers": 2, "width": 32, "heads": 4, "hidden": 0}
    fields |= {"dropout": 0.1, "class_dropout": 0.1, "dtype": "bfloat16"}
    config = {"task": "generator", "generator": fields, "optim": {"ema_decay": 0.5 if ema else 0.0}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "provenance.json").write_text(json.dumps({"tokenizer": "a" * 16, "condition": "null", "more": 1}))


def test_the_newest_checkpoint_of_a_workdir_is_loaded(tmp_path):
    trained, average = random_generator().params, random_generator(seed=1).params

    def loaded(folder, **options):
        found = load_generator(folder, **options)
        assert found.provenance == Provenance("a" * 16, "null")
        return found.params["output"]

    write_workdir(tmp_path / "ema", trained, average)
    np.testing.assert_array_equal(loaded(tmp_path / "ema"), average["output"])
    np.testing.assert_array_equal(loaded(tmp_path / "ema", use_ema=True), average["output"])
    np.testing.assert_array_equal(loaded(tmp_path / "ema", use_ema=False), trained["output"])
    write_workdir(tmp_path / "plain", trained, {})
    np.testing.assert_array_equal(loaded(tmp_path / "plain"), trained["output"])
    with pytest.raises(InputError, match="keeps no moving average"):
        loaded(tmp_path / "plain", use_ema=True)
    with pytest.raises(InputError, match="holds a training run"):
        generator().save_pretrained(tmp_path / "plain")


def test_what_is_no_generator_is_refused(tmp_path):
    with pytest.raises(InputError, match="the path does not exist"):
        load_generator(tmp_path / "none")
    with pytest.raises(InputError, match=r"neither weights.safetensors \(a saved generator\) nor config.json"):
        load_generator(tmp_path)
    tokenizer().save_pretrained(tmp_path / "tok")
    with pytest.raises(InputError, match="is not the config of a generator that this version can read"):
        load_generator(tmp_path / "tok")
    gen = generator()
    with pytest.raises(InputError, match="holds something else than a generator"):
        gen.save_pretrained(tmp_path / "tok")
    gen.save_pretrained(tmp_path / "gen")
    with pytest.raises(InputError, match=r"heads=8 contradicts .*config.json, which says 4"):
        load_generator(tmp_path / "gen", heads=8)
    with pytest.raises(InputError, match=r"grid=\(2, 8\) contradicts"):
        load_generator(tmp_path / "gen", grid=(2, 8))
    with pytest.raises(InputError, match="is no training workdir, so use_ema does nothing"):
        load_generator(tmp_path / "gen", use_ema=True)
    config = json.loads((tmp_path / "gen" / "config.json").read_text())
    for change, message in (
        ({"layers": 3}, r"does not hold this generator: .* of another shape"),
        ({"heads": 0}, "does not describe a generator"),
        ({"grid": [4]}, "does not describe a generator"),
    ):
        changed = {**config, "generator": {**config["generator"], **change}}
        (tmp_path / "gen" / "config.json").write_text(json.dumps(changed))
        with pytest.raises(InputError, match=message):
            load_generator(tmp_path / "gen")
    (tmp_path / "gen" / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json is damaged"):
        load_generator(tmp_path / "gen")
