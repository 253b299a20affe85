import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding

from fvq_jax.ops.sharded_codebook import TOKENS
from fvq_jax.ops.token_loss import BUDGET, HEAD, block_size, block_sizes, keeps_logits, token_nll
from tests.helpers.compiled_program import arrays, collectives, size
from tests.helpers.slow_cases import MESHES
from tests.helpers.tiny_generator import mesh_of


def problem(b=8, t=5, d=16, v=40, seed=0):
    """States, head, codes, and how much each code's loss counts."""
    rng = np.random.default_rng(seed)
    hidden, output, slope = (rng.normal(size=shape).astype(np.float32) for shape in ((b, t, d), (v, d), (b, t)))
    return hidden, output, rng.integers(0, v, (b, t), dtype=np.int32), slope


def oracle(hidden, output, codes, slope):
    """Loss, hits, both gradients, and the sizes of what their sums add up; all logits at once, in float64."""
    hidden, output, slope = (np.asarray(x, np.float64) for x in (hidden, output, slope))
    logits = hidden @ output.T
    top = logits.max(axis=-1, keepdims=True)
    log_sum = top + np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))
    own = codes[..., None] == np.arange(len(output))
    to_logits = (np.exp(logits - log_sum) - own) * slope[..., None]
    return {
        "nll": (log_sum - logits)[own].reshape(codes.shape),
        "hit": logits.argmax(axis=-1) == codes,
        "to_hidden": to_logits @ output,
        "to_output": np.einsum("btv,btd->vd", to_logits, hidden),
        "terms_to_hidden": np.abs(to_logits) @ np.abs(output),
        "terms_to_output": np.einsum("btv,btd->vd", np.abs(to_logits), np.abs(hidden)),
    }


@functools.partial(jax.jit, static_argnames=("mesh", "dtype", "blocks", "keep"))
def computed(hidden, output, codes, slope, **options):
    def loss(hidden, output):
        nll, hit = token_nll(hidden, output, codes, **options)
        return jnp.sum(nll * slope), (nll, hit)

    gradients, (nll, hit) = jax.grad(loss, argnums=(0, 1), has_aux=True)(hidden, output)
    return {"nll": nll, "hit": hit, "to_hidden": gradients[0], "to_output": gradients[1]}


def placed(mesh, hidden, output, codes, slope):
    layouts = [NamedSharding(mesh, spec) for spec in (TOKENS, HEAD, TOKENS, TOKENS)]
    return jax.device_put((hidden, output, codes, slope), tuple(layouts))


def assert_equals_oracle(actual, expected, slack=4e-6):
    np.testing.assert_allclose(actual["nll"], expected["nll"], rtol=2e-6, atol=1e-5)
    np.testing.assert_array_equal(actual["hit"], expected["hit"])
    for name in ("to_hidden", "to_output"):
        error = np.abs(np.asarray(actual[name], np.float64) - expected[name])
        assert np.all(error <= slack * expected[f"terms_{name}"] + 2e-6), name


sizes = st.integers(1, 23)


@settings(deadline=None, max_examples=12, derandomize=True)
@given(
    b=st.integers(1, 4),
    t=sizes,
    d=st.integers(1, 9),
    v=sizes,
    tokens=sizes,
    codes=sizes,
    keep=st.booleans(),
    seed=st.integers(0, 9),
)
def test_loss_hits_and_gradients_equal_the_formula(b, t, d, v, tokens, codes, keep, seed):
    given = problem(b, t, d, v, seed)
    assert_equals_oracle(computed(*given, blocks=(tokens, codes), keep=keep), oracle(*given))


@pytest.mark.parametrize("blocks", [None, (1, 1), (40, 40), (7, 13), (1000, 3)])
def test_blocks_change_nothing(blocks):
    given = problem()
    actual, expected = computed(*given, blocks=blocks), oracle(*given)
    assert 0 < expected["hit"].mean() < 1
    assert_equals_oracle(actual, expected)
    assert {name: value.dtype.name for name, value in actual.items()} == {
        "nll": "float32",
        "hit": "bool",
        "to_hidden": "float32",
        "to_output": "float32",
    }


@pytest.mark.parametrize(("blocks", "keep"), [(None, None), ((3, 4), False), ((3, 4), True)])
@pytest.mark.parametrize("sizes", MESHES)
def test_every_mesh_gives_the_same(sizes, blocks, keep):
    mesh, given = mesh_of(*sizes), problem()
    actual = computed(*placed(mesh, *given), mesh=mesh, blocks=blocks, keep=keep)
    assert_equals_oracle(actual, oracle(*given))
    assert actual["nll"].sharding.is_equivalent_to(NamedSharding(mesh, TOKENS), 2)
    assert actual["to_hidden"].sharding.is_equivalent_to(NamedSharding(mesh, TOKENS), 3)
    assert actual["to_output"].sharding.is_equivalent_to(NamedSharding(mesh, HEAD), 2)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("sizes", [None, (2, 4)])
def test_bfloat16_rounds_only_what_is_multiplied(sizes, keep):
    """The loss is exact for rounded states and head; gradients are off by one rounding of every term, 2^-8."""
    hidden, output, codes, slope = problem(t=16, d=32, v=120)
    rounded = [np.asarray(jnp.asarray(x, jnp.bfloat16).astype(jnp.float32)) for x in (hidden, output)]
    expected = oracle(*rounded, codes, slope)
    mesh = None if sizes is None else mesh_of(*sizes)
    given = hidden, output, codes, slope
    given = given if mesh is None else placed(mesh, *given)
    actual = computed(*given, mesh=mesh, dtype=jnp.dtype(jnp.bfloat16), blocks=(24, 16), keep=keep)
    assert_equals_oracle(actual, expected, slack=2**-8)
    assert actual["to_output"].dtype == jnp.float32
    # And it is not the loss of states that were not rounded.
    assert np.abs(actual["nll"] - oracle(hidden, output, codes, slope)["nll"]).max() > 1e-3


@pytest.mark.parametrize(("keep", "number"), [(False, 4), (True, 3)])
def test_float32_products_are_asked_for_at_the_highest_precision(keep, number):
    """Logits, once more if they are not kept, and both gradients."""
    text = computed.lower(*problem(), blocks=(8, 8), keep=keep).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert len(products) == number
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)


def test_logits_beyond_the_range_of_exponentials():
    hidden, output, codes, slope = problem()
    given = 40 * hidden, 40 * output, codes, slope
    expected = oracle(*given)
    assert expected["nll"].max() > 1e4
    actual = computed(*given, blocks=(7, 9))
    np.testing.assert_allclose(actual["nll"], expected["nll"], rtol=1e-5, atol=2e-2)
    assert np.isfinite(actual["to_output"]).all()


@pytest.mark.parametrize("sizes", MESHES)
def test_of_equal_logits_the_lowest_code_is_the_likeliest(sizes):
    """The same four rows again and again, in every block and on every device."""
    hidden, distinct, _, slope = problem(v=4)
    output = np.tile(distinct, (10, 1))
    best = (hidden @ distinct.T).argmax(axis=-1).astype(np.int32)
    mesh = mesh_of(*sizes)
    assert len(np.unique(best)) == 4
    for offset in (0, 4, 36):
        actual = computed(*placed(mesh, hidden, output, best + offset, slope), mesh=mesh, blocks=(6, 3))
        np.testing.assert_array_equal(actual["hit"], np.full(best.shape, offset == 0))


def test_a_zero_head_finds_all_codes_equally_likely():
    hidden, output, codes, slope = problem()
    actual = computed(hidden, 0 * output, codes, slope, blocks=(8, 8))
    np.testing.assert_allclose(actual["nll"], np.log(40), rtol=1e-6)
    np.testing.assert_array_equal(actual["hit"], codes == 0)


@pytest.mark.parametrize("wrong", [-1, 40, 2**31 - 1])
@pytest.mark.parametrize("sizes", [(1, 1), (2, 4)])
def test_a_code_that_does_not_exist_has_no_likelihood(sizes, wrong):
    hidden, output, codes, slope = problem()
    codes[1, 2] = wrong
    mesh = mesh_of(*sizes)
    actual = computed(*placed(mesh, hidden, output, codes, slope), mesh=mesh, blocks=(8, 7))
    np.testing.assert_array_equal(np.isnan(actual["nll"]), codes == wrong)
    assert not actual["hit"][1, 2]


def test_recomputing_gives_the_same_gradient():
    hidden, output, codes, _ = map(jnp.asarray, problem())

    def loss(hidden, wrap):
        return wrap(lambda x: token_nll(jnp.tanh(x), output, codes, blocks=(8, 8))[0])(hidden).mean()

    plain, remat = (jax.jit(jax.grad(functools.partial(loss, wrap=wrap)))(hidden) for wrap in (lambda f: f, jax.remat))
    assert np.abs(plain).max() > 1e-3
    np.testing.assert_allclose(remat, plain, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"b": 6}, "6 images cannot be divided evenly over 8 devices"),
        ({"v": 42}, "42 codes cannot be divided evenly over 4 devices"),
        ({"d": 15}, "15 columns of the head cannot be divided evenly over 2 devices"),
    ],
)
def test_sizes_that_the_mesh_does_not_divide_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        token_nll(*map(jnp.asarray, problem(**changes)[:3]), mesh=mesh_of(2, 4))


def test_blocks_of_nothing_are_refused():
    with pytest.raises(ValueError, match="blocks must be at least 1"):
        token_nll(*map(jnp.asarray, problem()[:3]), blocks=(0, 4))


def test_logits_are_kept_while_they_are_few():
    assert keeps_logits(4096, 16_384)
    assert not keeps_logits(4097, 16_384)
    few, many = ((1, tokens, 2) for tokens in (64, 65))
    for shape, products in ((few, 3), (many, 4)):
        given = jnp.zeros(shape), jnp.zeros((2**20, 2)), jnp.zeros(shape[:2], jnp.int32), jnp.zeros(shape[:2])
        assert computed.lower(*given).as_text().count("dot_general") == products


def test_nothing_is_kept_without_a_gradient():
    hidden, output, codes, _ = problem(b=1, t=7, v=41)
    run = jax.jit(functools.partial(token_nll, blocks=(7, 20), keep=True))
    assert ("f32", size(41, 7)) not in arrays(run.lower(hidden, output, codes).compile().as_text())


@pytest.mark.parametrize(
    ("length", "most", "wanted"),
    [(2048, 1536, 1024), (16_384, 1536, 1536), (512, 1536, 512), (2176, 2176, 2176), (40, 7, 7), (10, 7, 5), (3, 1, 1)],
)
def test_blocks_are_few_and_equally_large(length, most, wanted):
    assert block_size(length, most) == wanted


@functools.cache
def compiled(loss, sizes, width, vocab, dtype, images=64, length=256):
    """Loss and both gradients for codes of 64 images, not run."""
    mesh = mesh_of(*sizes)

    def abstract(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    hidden, output = abstract((images, length, width), jnp.float32, TOKENS), abstract((vocab, width), jnp.float32, HEAD)
    codes = abstract((images, length), jnp.int32, TOKENS)

    def mean(hidden, output, codes):
        nll, hit = loss(hidden, output, codes, mesh=mesh, dtype=dtype)
        return nll.mean(), hit.mean()

    options = {"xla_backend_optimization_level": 0}  # of machine code; what is kept where stays the same
    gradient = jax.jit(jax.value_and_grad(mean, argnums=(0, 1), has_aux=True), compiler_options=options)
    return gradient.lower(hidden, output, codes).compile()


def all_logits(hidden, output, codes, *, mesh, dtype):
    """The loss as it is usually written."""
    logits = jnp.einsum("btd,vd->btv", hidden.astype(dtype), output.astype(dtype)).astype(jnp.float32)
    own = jnp.take_along_axis(logits, codes[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - own, logits.argmax(axis=-1) == codes


def largest_array(program):
    """Its size in bytes."""
    width = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "pred": 1, "s64": 8, "f64": 8}
    return max(width[dtype] * math.prod(dims) for dtype, dims in arrays(program) if dtype in width)


@pytest.mark.parametrize("vocab", [262_144, 1_048_576])
@pytest.mark.parametrize("sizes", [(1, 1), (2, 4)])
def test_no_array_has_all_tokens_and_codes(sizes, vocab):
    """With states of 8 channels, whole heads and states are small: nothing at all may be above the budget."""
    program = compiled(token_nll, sizes, 8, vocab, jnp.float32).as_text()
    lengths = 64 * 256 // math.prod(sizes), vocab // sizes[1]
    block = map(block_size, lengths, block_sizes(8, jnp.float32))
    assert ("f32", size(*block)) in arrays(program)
    assert largest_array(program) <= BUDGET
    assert largest_array(compiled(all_logits, sizes, 8, vocab, jnp.float32).as_text()) > 30 * BUDGET


@pytest.mark.parametrize(
    ("sizes", "vocab", "dtype"),
    [
        ((1, 1), 1_048_576, jnp.float32),
        ((1, 1), 262_144, jnp.bfloat16),
        ((2, 4), 1_048_576, jnp.bfloat16),
        ((8, 1), 262_144, jnp.float32),
    ],
)
def test_temporaries_stay_within_the_budget(sizes, vocab, dtype):
    """At the width of the published size L, of which 1,048,576 rows of a head are 4 GiB."""
    states = 64 * 256 * 1024 // math.prod(sizes)
    allowed = BUDGET + states * (jnp.dtype(dtype).itemsize + 4)
    assert compiled(token_nll, sizes, 1024, vocab, dtype).memory_analysis().temp_size_in_bytes <= allowed
    control = compiled(all_logits, sizes, 1024, vocab, dtype)
    assert control.memory_analysis().temp_size_in_bytes > 10 * allowed


@pytest.mark.parametrize(("width", "dtype"), [(64, jnp.float32), (1024, jnp.bfloat16), (3200, jnp.float32)])
def test_blocks_follow_from_the_width(width, dtype):
    tokens, codes = block_sizes(width, dtype)
    assert tokens == codes
    assert tokens % 128 == 0
    logits = 4 * tokens * codes
    assert BUDGET / 100 < logits < BUDGET
    assert block_sizes(8 * width, dtype) < (tokens, codes)


def test_what_devices_send_each_other():
    """Tokens around the ring; blocks of the head in the dtype of the products, and their gradients in float32."""
    b, t, d, v, blocks = 16, 11, 26, 4 * 37, (5, 7)
    mesh = mesh_of(2, 4)
    given = placed(mesh, *problem(b, t, d, v))
    program = computed.lower(*given, mesh=mesh, dtype=jnp.dtype(jnp.bfloat16), blocks=blocks).compile().as_text()
    mine = b * t // 8
    sent = {
        ("collective-permute", "bf16", size(mine, d)),  # states
        ("collective-permute", "s32", size(mine)),  # codes, and the best ones so far
        ("collective-permute", "f32", size(mine)),  # maxima, sums and own logits
        ("collective-permute", "f32", size(mine, d)),  # the gradient of the states
        ("all-gather", "bf16", size(2, blocks[1], d // 2)),  # a block of the head's rows
        ("reduce-scatter", "f32", size(blocks[1], d // 2)),  # and its gradient, over `data`
    }
    found = collectives(program)
    # A CPU sends bfloat16 as float32, or as integers of the same bits.
    assert {(kind, dims) for kind, _, dims in found} == {(kind, dims) for kind, _, dims in sent}
    assert not [dims for _, dims in arrays(program) if dims == size(v // 4, d)]
