import jax
import pytest

from fvq_jax.runtime.names import did_you_mean, dotted, flatten, nest, path_name

TREE = {"encoder": {"conv": {"kernel": 1, "bias": 2}}, "codebook": 3}
FLAT = {"codebook": 3, "encoder/conv/bias": 2, "encoder/conv/kernel": 1}


def test_leaves_of_a_tree_are_named_by_their_paths():
    assert flatten(TREE) == FLAT
    assert flatten({"a": [5, {"b": 6}]}) == {"a/0": 5, "a/1/b": 6}
    assert [path_name(path) for path, _ in jax.tree.leaves_with_path(TREE)] == list(FLAT)


def test_named_leaves_become_a_tree_again():
    assert nest(FLAT) == TREE
    assert nest({"optim.b1": 0.9, "seed": 0}, ".") == {"optim": {"b1": 0.9}, "seed": 0}


def test_settings_of_sections_have_full_names_and_lists_for_tuples():
    assert dotted({"a": 1, "b": {"c": (1, 2), "d": {"e": "x"}}}) == {"a": 1, "b.c": [1, 2], "b.d.e": "x"}
    assert dotted({"e": 1}, "b.d.") == {"b.d.e": 1}


KNOWN = [
    "seed",
    "batch_size",
    "eval.batch_size",
    "eval.every_steps",
    "checkpoint.every_steps",
    "optim.learning_rate",
    "optim.codebook_learning_rate",
    "tokenizer.remat",
    "tokenizer.quantizer.bridge",
]


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("tokenizer.brigde", "tokenizer.quantizer.bridge"),  # a forgotten section and a slip of the finger
        ("tokenizer.bridge", "tokenizer.quantizer.bridge"),
        ("bridge", "tokenizer.quantizer.bridge"),
        ("optim.learning_rte", "optim.learning_rate"),
        ("learning_rate", "optim.learning_rate"),
        ("batchsize", "batch_size"),
        ("evl.batch_size", "eval.batch_size"),
        ("checkpoints.every_step", "checkpoint.every_steps"),
    ],
)
def test_what_a_misspelt_name_meant(name, meant):
    assert did_you_mean(name, KNOWN) == f"; did you mean {meant}?"
    assert did_you_mean(name, reversed(KNOWN)) == f"; did you mean {meant}?"


@pytest.mark.parametrize("known", [KNOWN, []])
def test_nothing_is_guessed_without_a_likeness(known):
    assert did_you_mean("zzz.qqq", known) == ""
