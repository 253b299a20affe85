import jax
import numpy as np

from fvq_jax.checkpoint import Checkpoints
from fvq_jax.sharding import make_mesh, path_name
from fvq_jax.state import abstract_state
from fvq_jax.tasks.tokenizer import TokenizerTask
from tests.tiny import tiny_config


def abstract(data, codebook):
    """Shapes and layout, on so many devices, of all that a run can have: discriminator, moments, moving average."""
    config = tiny_config(**{"adversarial.weight": 0.5, "optim.ema_decay": 0.9, "tokenizer.ch_mult": (1,)})
    mesh = make_mesh(data, codebook, devices=jax.devices()[: data * codebook])
    return abstract_state(TokenizerTask(config, mesh, 10, 0).init, mesh)


def test_a_checkpoint_moves_to_another_mesh_and_fewer_devices(tmp_path):
    """8 -> 2 -> 1 devices, the codebook cut in four, in two and whole; bit for bit, moments included."""
    rng = np.random.default_rng(0)
    values = jax.tree.map(lambda leaf: rng.normal(scale=99, size=leaf.shape).astype(leaf.dtype), abstract(2, 4))
    state = jax.tree.map(lambda value, leaf: jax.device_put(value, leaf.sharding), values, abstract(2, 4))
    for step, (data, codebook) in enumerate([(1, 2), (1, 1)]):
        like, folder = abstract(data, codebook), tmp_path / str(step)
        with Checkpoints(folder) as checkpoints:
            checkpoints.save(state, step, {"devices": step})
        with Checkpoints(folder) as checkpoints:
            restored = checkpoints.restore(like)
        assert restored.record == {"devices": step}
        state = restored.state
        for (path, leaf), asked, value in zip(
            jax.tree.leaves_with_path(state), jax.tree.leaves(like), jax.tree.leaves(values), strict=True
        ):
            np.testing.assert_array_equal(leaf, value, err_msg=path_name(path))
            assert leaf.sharding == asked.sharding
            cut = codebook if path_name(path).endswith("/quantizer/codebook") else 1
            assert {shard.data.nbytes for shard in leaf.addressable_shards} == {leaf.nbytes // cut}
