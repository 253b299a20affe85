"""What devices send each other in a training step, read from the compiled program of 2 x 4 devices."""

import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from fvq_jax.models.quantizers.bridge import VQBridge, parse_bridge
from fvq_jax.ops import entropy, nearest_cpu
from fvq_jax.runtime.mesh import BATCH, make_mesh, replicated
from fvq_jax.runtime.names import path_name
from tests.helpers.compiled_program import arrays, collectives, size
from tests.helpers.tiny import make_step, tiny_config

DATA, AXIS = 2, 4
SIDE = 11  # of the grid: its square is a factor of no other size
CODES, DIM = 1600, 13
TOKENS = 8 * SIDE * SIDE  # one image for each device
WIDTH = 32  # of the bridge's tokens, of which there are CODES / 4
BLOCK = 48  # codes that are scored at a time, of the 400 that a device holds
# Machine code that is hardly optimised compiles in half the time; what is computed where stays the same.
HARDLY_OPTIMISED = {"xla_backend_optimization_level": 0}


def faults(program):
    """What no device may hold: all rows of the codebook, or a score for every token and code."""
    found = [
        f"{kind} as large as the codebook: {dtype}{list(dims)}"
        for kind, dtype, dims in collectives(program)
        if math.prod(dims) >= CODES * DIM
    ]
    for dtype, dims in arrays(program):
        if math.prod(dims) % (CODES * DIM) == 0:
            found.append(f"codebook: {dtype}{list(dims)}")
        # The smallest has all of a device's tokens and all of its rows; the larger ones are multiples.
        if math.prod(dims) % (TOKENS // DATA // AXIS * CODES // AXIS) == 0:
            found.append(f"[tokens, codes]: {dtype}{list(dims)}")
    return sorted(found)


def abstract(shape, mesh, spec):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))


@pytest.fixture(scope="module")
def step():
    """The abstract state, and the compiled training step as text."""
    config = tiny_config(
        **{
            "batch_size": 8,
            "data.image_size": SIDE,
            "tokenizer.ch_mult": (1,),
            "tokenizer.quantizer.codebook_size": CODES,
            "tokenizer.quantizer.code_dim": DIM,
            "tokenizer.quantizer.bridge": "XS/2-d1",
            "tokenizer.quantizer.entropy_weight": 0.1,
            "optim.ema_decay": 0.9,
        }
    )
    mesh = make_mesh(DATA, AXIS)
    step = make_step(config, mesh)
    state = step.abstract()
    images = jax.ShapeDtypeStruct((8, SIDE, SIDE, 3), jnp.uint8, sharding=NamedSharding(mesh, BATCH))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nearest_cpu, "default_block_size", lambda k, d: BLOCK)
        patch.setattr(entropy, "BLOCK_SIZE", BLOCK)
        lowered = step.jitted(state).lower(state, {"image": images}, {})
    return state, lowered.compile(compiler_options=HARDLY_OPTIMISED).as_text()


def test_no_rows_travel_and_no_distances_are_kept(step):
    _, program = step
    assert ("f32", size(TOKENS // DATA, BLOCK)) in arrays(program)  # what is scored at a time is found
    assert faults(program) == []


def test_the_collectives_are_the_intended_ones(step):
    state, program = step
    group, mine = TOKENS // DATA, TOKENS // DATA // AXIS
    bridge_tokens = size(CODES // 4, 4, WIDTH // 4)
    intended = {
        ("all-gather", "f32", size(group, DIM)),  # latents to the devices that hold rows; gradients of what they got
        ("all-reduce", "f32", size(DIM)),  # the mean code
        ("all-to-all", "f32", size(mine)),  # the best score of every shard of rows, to the owner of the token
        ("all-to-all", "s32", size(mine)),  # and its index
        ("all-gather", "s32", size(group)),  # codes to the devices that hold rows
        ("reduce-scatter", "f32", size(mine, DIM)),  # vectors looked up, to the owner of the token
        ("all-reduce", "f32", size(CODES // AXIS, DIM)),  # the gradient of a device's own rows, over `data`
        ("all-reduce", "f32", size(group)),  # the entropy term: sums over all codes for every token
        ("all-reduce", "f32", size(CODES // AXIS)),  # and how often a device's own rows are expected, over `data`
        ("all-gather", "f32", bridge_tokens),  # keys and values of the bridge's attention
        ("all-reduce", "f32", bridge_tokens),  # their gradients
        ("all-reduce", "s32", size(CODES)),  # how often each code was chosen
        ("all-reduce", "f32", size()),  # loss terms and the gradient's norm
    }
    params = state.networks["tokenizer"].params
    intended |= {  # gradients of all other parameters
        ("all-reduce", "f32", size(*leaf.shape))
        for path, leaf in jax.tree.leaves_with_path(params)
        if path_name(path) != "quantizer/codebook"
    }
    assert collectives(program) == intended


def test_a_gathered_codebook_is_found():
    mesh = make_mesh(DATA, AXIS)
    codebook = abstract((CODES, DIM), mesh, P("codebook"))
    program = jax.jit(lambda rows: 2 * rows, out_shardings=replicated(mesh)).lower(codebook).compile().as_text()
    rows = f"f32[{DIM}, {CODES}]"
    assert faults(program) == [f"all-gather as large as the codebook: {rows}", f"codebook: {rows}"]


def test_a_matrix_of_distances_is_found():
    mesh = make_mesh(DATA, AXIS)
    tokens, codebook = abstract((TOKENS, DIM), mesh, BATCH), abstract((CODES, DIM), mesh, P())

    def nearest_of_all(z, codebook):
        return jnp.argmin(jnp.sum(codebook**2, axis=1)[None] - 2 * z @ codebook.T, axis=1)

    program = jax.jit(nearest_of_all).lower(tokens, codebook).compile().as_text()
    assert f"[tokens, codes]: f32[{SIDE**2}, {CODES}]" in faults(program)


@pytest.mark.parametrize("groups", ["2d", "1d"])
def test_the_axis_divides_the_work_of_the_bridge(groups):
    """Compress, blocks and recover, forward and backward; what travels are keys and values, never rows."""
    codes, groups_of_4, width, axis = 2304, 576, 32, 8  # 24 rows of 24 patches: three rows for each device
    bridge = VQBridge(parse_bridge("XS/2-d1"), groups, divided=True)

    def compile_on(axis):
        mesh = jax.make_mesh(
            (1, axis), ("data", "codebook"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:axis]
        )
        codebook = abstract((codes, DIM), mesh, P("codebook"))
        params = jax.eval_shape(bridge.init, jax.random.key(0), codebook)
        params = jax.tree.map(lambda leaf: abstract(leaf.shape, mesh, P()), params)

        def gradient(params, codebook, weights):
            return jax.grad(lambda *args: jnp.sum(bridge.apply(*args) * weights), argnums=(0, 1))(params, codebook)

        layouts = replicated(mesh), codebook.sharding
        jitted = jax.jit(gradient, out_shardings=layouts, compiler_options=HARDLY_OPTIMISED)
        return params, jitted.lower(params, codebook, codebook).compile()

    _, one = compile_on(1)
    params, eight = compile_on(axis)
    assert eight.cost_analysis()["flops"] == pytest.approx(one.cost_analysis()["flops"] / axis, rel=0.02)
    program = eight.as_text()
    for layer in ("compress", "recover"):
        rows = re.findall(rf" = f32\[(\d+),\d+\]\S* dot\(.*/{layer}/dot_general", program)
        assert str(groups_of_4 // axis) in rows
        assert str(groups_of_4) not in rows
    tokens = size(groups_of_4, 4, width // 4)
    intended = {("all-gather", "f32", tokens), ("all-reduce", "f32", tokens)}
    intended |= {("all-reduce", "f32", size(*leaf.shape)) for leaf in jax.tree.leaves(params)}
    assert collectives(program) == intended
