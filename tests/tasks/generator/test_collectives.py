"""What devices hold and send in a training step of a generator, read from the compiled program of 2 x 4 devices."""

import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from fvq_jax.models.gpt import GPT
from fvq_jax.runtime.compiled_cost import bytes_per_device
from fvq_jax.runtime.mesh import BATCH, make_mesh
from fvq_jax.tasks.generator import flops
from tests.helpers.compiled_program import arrays, collectives, size
from tests.helpers.tiny import make_step
from tests.helpers.tiny_generator import mesh_of, tiny_config

DATA, AXIS = 2, 4
IMAGES, GRID, LAYERS = 16, (3, 5), 3
LENGTH, MINE = GRID[0] * GRID[1], IMAGES // DATA // AXIS
VOCAB, CLASSES, WIDTH, HIDDEN = 104, 6, 48, 56
CONFIG = {
    "batch_size": IMAGES,
    "generator.grid": GRID,
    "generator.vocab": VOCAB,
    "generator.classes": CLASSES,
    "generator.layers": LAYERS,
    "generator.width": WIDTH,
    "generator.heads": 2,
    "generator.hidden": HIDDEN,
    "optim.ema_decay": 0.9,
}
MATRICES = ((WIDTH, 3 * WIDTH), (WIDTH, WIDTH), (WIDTH, HIDDEN), (HIDDEN, WIDTH))  # of one layer
LARGE = (262144, 1048576)
# Machine code that is hardly optimised compiles in half the time; what is computed where stays the same.
HARDLY_OPTIMISED = {"xla_backend_optimization_level": 0}


def lowered(config, mesh):
    """The state of a step, and the step lowered for it."""
    step = make_step(config, mesh)
    state, layout = step.abstract(), NamedSharding(mesh, BATCH)
    batch = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout)
        for name, leaf in step.task.batch_spec().items()
    }
    return state, step.jitted(state).lower(state, batch, {})


@pytest.fixture(scope="module")
def step():
    """The abstract state, and the compiled training step as text."""
    state, program = lowered(tiny_config(**CONFIG), make_mesh(DATA, AXIS))
    return state, program.compile(compiler_options=HARDLY_OPTIMISED).as_text()


def whole_network(program):
    """Arrays as large as the same matrix of all layers, which no device may hold."""
    wanted = {size(LAYERS, *matrix) for matrix in MATRICES}
    return sorted(f"{dtype}{list(dims)}" for dtype, dims in arrays(program) if dims in wanted)


def test_no_device_holds_the_weights_of_all_layers(step):
    _, program = step
    assert ("f32", size(WIDTH, 3 * WIDTH)) in arrays(program)  # those of one layer are there
    assert whole_network(program) == []


def test_gathered_weights_that_are_kept_are_found(monkeypatch):
    monkeypatch.setattr("fvq_jax.models.gpt._costly", lambda *_, **__: True)
    _, program = lowered(tiny_config(**CONFIG), make_mesh(DATA, AXIS))
    assert whole_network(program.compile(compiler_options=HARDLY_OPTIMISED).as_text())


def test_the_collectives_are_the_intended_ones(step):
    _, program = step
    rows, tokens = VOCAB // AXIS, MINE * LENGTH
    looked_up = MINE * (LENGTH - 1)  # of the last code of an image no vector is needed
    gathered = {size(a, b) for a, b in MATRICES} | {
        size(a // DATA, b) for a, b in MATRICES
    }  # along one axis, then both
    intended = {
        *(("all-gather", "f32", dims) for dims in gathered),
        ("all-gather", "f32", size(CLASSES + 1, WIDTH)),
        ("all-gather", "f32", size(rows, WIDTH)),  # the columns of a device's rows: of the embedding
        ("all-gather", "f32", size(rows, DATA, WIDTH // DATA)),  # and of the head
        ("all-gather", "s32", size(AXIS * looked_up)),  # codes, to the devices that hold the rows of the embedding
        ("reduce-scatter", "f32", size(looked_up, WIDTH)),  # their vectors, to the device of the image
        ("all-gather", "f32", size(AXIS * looked_up, WIDTH)),  # and back, their gradients
        ("collective-permute", "f32", size(tokens, WIDTH)),  # states around the ring of the head's rows, and gradients
        ("collective-permute", "f32", size(tokens)),  # what was seen of the logits
        ("collective-permute", "s32", size(tokens)),
        ("reduce-scatter", "f32", size(rows, WIDTH // DATA)),  # gradients of the head
        ("all-reduce", "f32", size(rows, WIDTH)),  # of the embedding
        ("all-reduce", "f32", size(CLASSES + 1, WIDTH)),
        *(("all-reduce", "f32", size(*matrix)) for matrix in MATRICES),  # a CPU has no reduce-scatter for them
        ("all-reduce", "f32", size(WIDTH)),  # norms
        ("all-reduce", "s32", size(VOCAB)),  # how often each code came
        ("all-reduce", "f32", size()),  # scalars and the gradient's norm
    }
    assert collectives(program) == intended


def test_parameters_moments_and_average_are_divided_over_all_devices(step):
    """All but the weights of norms, which are small; the classes are divided along one axis."""
    state, _ = step
    network = state.networks["generator"]
    for tree, copies in ((network.params, 1), (network.opt_state, 2), (state.ema, 1)):
        whole = sum(math.prod(leaf.shape) * 4 for leaf in jax.tree.leaves(tree))
        norms = copies * 4 * WIDTH * (2 * LAYERS + 1)
        classes = copies * 4 * (CLASSES + 1) * WIDTH
        counts = 4 * sum(leaf.ndim == 0 for leaf in jax.tree.leaves(tree))
        divided = whole - norms - classes - counts
        assert bytes_per_device(tree) == divided / (DATA * AXIS) + classes / DATA + norms + counts


def logits_of(program, vocab, axis, tokens):
    """Arrays that hold a number for every token of a device and every code of its rows, or more."""
    found = [f"{dtype}{list(dims)}" for dtype, dims in arrays(program) if math.prod(dims) >= tokens * vocab // axis]
    return sorted(found)


@pytest.mark.parametrize(
    ("vocab", "sizes"), [(LARGE[0], (2, 4)), (LARGE[1], (1, 1)), pytest.param(LARGE[1], (2, 4), marks=pytest.mark.slow)]
)
def test_no_logits_of_all_tokens_for_all_codes(vocab, sizes):
    """With 8 times 64 tokens on a device and 16 channels, the largest array is that of the head."""
    mesh = mesh_of(*sizes)
    config = tiny_config(
        **{
            "batch_size": 8 * mesh.size,
            "generator.vocab": vocab,
            "generator.grid": (8, 8),
            "generator.layers": 1,
            "generator.width": 16,
            "generator.heads": 2,
            "generator.hidden": 16,
        }
    )
    _, program = lowered(config, mesh)
    text = program.compile(compiler_options=HARDLY_OPTIMISED).as_text()
    assert ("f32", size(vocab // sizes[1], 16 // sizes[0])) in arrays(text)
    assert logits_of(text, vocab, sizes[1], 8 * 64) == []


def test_logits_of_all_tokens_are_found():
    net = GPT(LARGE[0], 4, (8, 8), 1, 16, 2, 16)
    labels, codes = jnp.zeros(8, jnp.int32), jnp.zeros((8, 64), jnp.int32)
    params = jax.eval_shape(net.init, jax.random.key(0), labels, codes)
    program = jax.jit(lambda params: net.apply(params, labels, codes, method="logits").argmax(-1)).lower(params)
    assert logits_of(program.compile().as_text(), LARGE[0], 1, 8 * 64)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("remat", "unroll", "micro", "keep"),
    [
        (False, False, 1, False),
        (True, False, 1, False),
        (True, True, 1, False),
        (False, False, 2, False),
        (False, False, 2, True),
    ],
)
def test_counted_and_uncounted_flops_are_those_of_the_step(remat, unroll, micro, keep, monkeypatch):
    """XLA also counts what is done elementwise: a few per cent at this width."""
    # Of the 8 images of a micro-batch a device has 2, each of 64 codes.
    monkeypatch.setattr("fvq_jax.ops.token_loss.KEPT", 4 * 2 * 64 * 8192 - (not keep))
    mesh = mesh_of(2, 2)
    images = 8 * micro
    config = tiny_config(
        **{
            "batch_size": images,
            "generator.vocab": 8192,
            "generator.layers": 5,
            "generator.width": 128,
            "generator.heads": 2,
            "generator.grid": (8, 8),
            "generator.remat": remat,
            "generator.unroll": unroll,
            "optim.accumulate": micro,
        }
    )
    step = make_step(config, mesh)
    _, program = lowered(config, mesh)
    counted = program.compile(compiler_options=HARDLY_OPTIMISED).cost_analysis()["flops"] * mesh.size * micro
    uncounted, passes = step.task.uncounted_flops("cpu")
    wanted = flops.step_flops(step.task.net, images, mesh.size * micro)
    assert passes == 1
    assert 0 < uncounted < wanted
    assert counted + uncounted == pytest.approx(wanted, rel=0.05)
    # The rule of thumb: 6 flops per parameter and token, 8 where products of the forward pass are done again.
    n = step.task.net
    weights = n.layers * (4 * n.width**2 + 3 * n.width * 512)
    pairs = 4 * n.layers * n.length * n.width
    tokens = images * n.length
    layers = (8 if remat else 6) * weights + (4 if remat else 3) * pairs
    assert wanted == tokens * (layers + (6 if keep else 8) * n.vocab * n.width)


def test_a_head_over_a_vocabulary_axis_is_laid_out_as_the_loss_wants_it(step):
    state, _ = step
    for name in ("output", "tok_embedding"):
        assert state.networks["generator"].params[name].sharding.spec == P("codebook", "data")
