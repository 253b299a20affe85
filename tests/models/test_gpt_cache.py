import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fvq_jax.models.gpt_cache import decode, decoding_weights, segment_ends
from fvq_jax.ops.sampling import greedy
from tests.helpers.random_generator import random_gpt_params, tiny_gpt

NET = tiny_gpt(grid=(10, 13))  # 130 positions: three segments


@functools.cache
def weights_of(dtype="float32"):
    params = random_gpt_params(NET)
    return params, decoding_weights(params, dtype)


def test_segments_cover_all_positions():
    assert segment_ends(16) == [16]
    assert segment_ends(130) == [48, 88, 130]
    assert segment_ends(256) == [64, 128, 192, 256]
    assert segment_ends(576) == [144, 288, 432, 576]
    assert segment_ends(1) == [1]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", 1e-5), pytest.param("bfloat16", 0.05, marks=pytest.mark.slow)]
)
def test_logits_with_the_cache_are_those_of_the_whole_sequence(dtype, tolerance):
    """A code is repeated only where all its logits are right, in every segment."""
    net = NET.clone(dtype=jnp.dtype(dtype))
    params, weights = weights_of(dtype)
    labels = jnp.array([3, 10, 0])
    codes = jnp.asarray(np.random.default_rng(1).integers(0, net.vocab, (3, net.length)), jnp.int32)
    expected = jax.jit(functools.partial(net.apply, method="logits"))({"params": params}, labels, codes)
    largest = jnp.max(jnp.abs(expected))

    def repeat(wanted, logits, position):
        right = jnp.max(jnp.abs(logits - wanted[:, position]), axis=-1) <= tolerance * largest
        return jnp.where(right, codes[:, position], -1)

    run = jax.jit(lambda weights, wanted: decode(net, weights, labels, functools.partial(repeat, wanted)))
    np.testing.assert_array_equal(run(weights, expected), codes)
    if dtype == "float32":
        wrong = np.asarray(run(weights, expected.at[1, 100, 5].add(1e-3 * largest)))
        assert (wrong[1, 100], (wrong < 0).sum()) == (-1, 1) or (wrong[1, 100:] < 0).any()
        assert (wrong[[0, 2]] == codes[jnp.array([0, 2])]).all()


def test_the_cache_may_have_another_dtype_than_the_products():
    _, weights = weights_of()
    labels = jnp.arange(2)

    def run(dtype):
        text = jax.jit(lambda w: decode(NET, w, labels, lambda z, _: greedy(z), cache_dtype=dtype)).lower(weights)
        return text.as_text()

    assert "x8xbf16" in run(jnp.bfloat16)
    assert "x8xbf16" not in run(None)


def copies_in_loops(text, elements):
    """The lines of a compiled program, inside its loops, that copy an array with so many elements or more."""
    computations = {match[1]: match[0] for match in re.finditer(r"^(%[\w.-]+) .*?^}", text, re.DOTALL | re.MULTILINE)}
    waiting, seen = re.findall(r"body=(%[\w.-]+)", text), set()
    found = []
    while waiting:
        name = waiting.pop()
        if name in seen or name not in computations:
            continue
        seen.add(name)
        waiting += re.findall(r"(?:calls|to_apply|body|condition)=(%[\w.-]+)", computations[name])
        for line in computations[name].splitlines():
            result = re.search(r"= \w+\[([\d,]+)\]\S* (?:copy|copy-start|transpose|concatenate|pad|slice)\(", line)
            if result and np.prod([int(side) for side in result[1].split(",")]) >= elements:
                found.append(line.strip())
    return found


def test_the_cache_is_written_in_place():
    """No step copies, cuts or transposes keys or values of a layer: the smallest ones have 48 positions."""
    rows = 8
    _, weights = weights_of()
    smallest = rows * NET.width * segment_ends(NET.length)[0]

    def greedily(logits, position):
        return greedy(logits)

    text = (
        jax.jit(lambda w, labels: decode(NET, w, labels, greedily)).lower(weights, jnp.arange(rows)).compile().as_text()
    )
    assert len(re.findall(r"f32\[8,4,130,8\]", text)) > 4
    assert copies_in_loops(text, smallest) == []

    def keeps_the_old(position, carry):
        cache, _ = carry
        return jax.lax.dynamic_update_slice(cache, jnp.ones((rows, 4, 1, 8)), (0, 0, position, 0)), cache

    start = (jnp.zeros((rows, 4, 48, 8)),) * 2
    control = jax.jit(lambda carry: jax.lax.fori_loop(0, 48, keeps_the_old, carry)).lower(start).compile().as_text()
    assert copies_in_loops(control, smallest)
