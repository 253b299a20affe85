import errno
import logging
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging as absl_logging

from fvq_jax.runtime.checksums import FILE as CHECKSUMS
from fvq_jax.runtime.errors import InputError, StorageError
from fvq_jax.runtime.mesh import make_mesh
from fvq_jax.runtime.names import path_name
from fvq_jax.training import checkpoint
from fvq_jax.training.checkpoint import Checkpoints
from fvq_jax.training.state import TrainState
from tests.helpers.tiny import make_step, tiny_config

UNLISTED = ("_CHECKPOINT_METADATA", "commit_success.txt")  # written when the folder gets its name


def abstract(data, codebook):
    """Shapes and layout, on so many devices, of all that a run can have: discriminator, moments, moving average."""
    config = tiny_config(**{"adversarial.weight": 0.5, "optim.ema_decay": 0.9, "tokenizer.ch_mult": (1,)})
    mesh = make_mesh(data, codebook, devices=jax.devices()[: data * codebook])
    return make_step(config, mesh).abstract()


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


def state_at(step):
    """Two arrays, large enough to have files of their own, which a flipped bit leaves readable."""
    noise = np.random.default_rng(step).normal(size=(2, 64, 64)).astype(np.float32)
    return TrainState(jnp.int32(step), jnp.int32(0), {"net": {"kernel": jnp.array(noise), "bias": jnp.ones(7)}}, {})


def like():
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state_at(0))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Steps 3, 6 and 9, of which two are kept."""
    workdir = tmp_path_factory.mktemp("saved")
    with Checkpoints(workdir) as checkpoints:
        for step in (3, 6, 9):
            checkpoints.save(state_at(step), step, {"step": step})
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["step_6", "step_9"]
    return workdir


@pytest.fixture
def workdir(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


@pytest.fixture
def warnings():
    """What is logged from warnings on."""
    lines = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())
    absl_logging.get_absl_logger().addHandler(handler)
    yield lines
    absl_logging.get_absl_logger().removeHandler(handler)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def remove(path):
    path.unlink()


def restore(workdir, **options):
    with Checkpoints(workdir, **options) as checkpoints:
        return checkpoints.restore(like())


def assert_is_step(restored, step):
    assert restored.record == {"step": step}
    for ours, theirs in zip(jax.tree.leaves(restored.state), jax.tree.leaves(state_at(step)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("damage", [flip, truncate, remove], ids=lambda damage: damage.__name__)
def test_any_damaged_file_is_named_and_the_checkpoint_before_is_taken(saved, tmp_path, warnings, damage):
    newest = saved / "checkpoints" / "step_9"
    there = {str(path.relative_to(newest)) for path in newest.rglob("*") if path.is_file()}
    listed = {line.split()[1] for line in (newest / CHECKSUMS).read_text().splitlines()}
    assert there - listed == {CHECKSUMS, *UNLISTED}
    for number, name in enumerate(sorted(listed)):
        copy = shutil.copytree(saved, tmp_path / str(number))
        damage(copy / "checkpoints" / "step_9" / name)
        warnings.clear()
        assert_is_step(restore(copy), 6)
        (line,) = warnings
        assert str(copy / "checkpoints" / "step_9") in line
        assert name in line
        assert (copy / "checkpoints_damaged" / "step_9").is_dir()
        assert [path.name for path in (copy / "checkpoints").iterdir()] == ["step_6"]


@pytest.mark.parametrize("damage", [flip, truncate, remove], ids=lambda damage: damage.__name__)
def test_what_has_no_checksum_is_not_needed(workdir, damage):
    for name in UNLISTED:
        damage(workdir / "checkpoints" / "step_9" / name)
    assert_is_step(restore(workdir), 9)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax leaves its coroutines
@pytest.mark.parametrize("name", ["state/manifest.ocdbt", "state/_METADATA", "record/metadata"])
def test_an_older_checkpoint_without_checksums_can_be_read_if_it_is_whole(workdir, warnings, name):
    (workdir / "checkpoints" / "step_9" / CHECKSUMS).unlink()
    assert_is_step(restore(workdir, read_only=True), 9)
    truncate(workdir / "checkpoints" / "step_9" / name)
    assert_is_step(restore(workdir, read_only=True), 6)
    assert "step_9 is damaged" in warnings[0]


def test_a_run_goes_on_from_no_checkpoint_without_checksums(workdir, warnings):
    """It has none: what lacks them was left by a process that was killed while it moved or removed the folder."""
    (workdir / "checkpoints" / "step_9" / CHECKSUMS).unlink()
    assert_is_step(restore(workdir), 6)
    assert f"{CHECKSUMS} is missing" in warnings[0]


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("missing", [CHECKSUMS, "record/metadata", ""])
def test_a_checkpoint_that_was_not_moved_to_its_name_as_a_whole_was_not_completed(workdir, warnings, missing, alone):
    """As in a bucket, where a folder is renamed file by file and the process was killed in between."""
    final = workdir / "checkpoints" / "step_9"
    left = shutil.copytree(final, final.with_name("step_9.orbax-checkpoint-tmp"))
    if missing:
        (final / missing).unlink()
    if alone:
        shutil.rmtree(workdir / "checkpoints" / "step_6")
    if not alone:
        assert_is_step(restore(workdir, read_only=True), 6 if missing else 9)
        assert left.exists()
    warnings.clear()
    with Checkpoints(workdir) as checkpoints:
        assert checkpoints.latest_step() == (9 if not missing else None if alone else 6)
    assert not left.exists()
    assert final.exists() == (not missing)
    assert not warnings
    assert not (workdir / "checkpoints_damaged").exists()


def test_the_damaged_step_can_be_saved_and_damaged_again(workdir):
    for count in (1, 2):
        truncate(workdir / "checkpoints" / "step_9" / "state" / "_METADATA")
        with Checkpoints(workdir) as checkpoints:
            assert_is_step(checkpoints.restore(like()), 6)
            checkpoints.save(state_at(9), 9, {"step": 9})
        assert_is_step(restore(workdir), 9)
        assert len(list((workdir / "checkpoints_damaged").iterdir())) == count


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(workdir):
    for step in (6, 9):
        flip(workdir / "checkpoints" / f"step_{step}" / "record" / "metadata")
    for _ in range(2):
        with pytest.raises(InputError, match=r"no undamaged checkpoint in .*step 9: record/metadata .*step 6: record"):
            restore(workdir)
    with Checkpoints(workdir) as checkpoints:
        assert checkpoints.latest_step() == 9


def test_a_reader_passes_over_damage_and_touches_nothing(workdir, warnings):
    flip(workdir / "checkpoints" / "step_9" / "state" / "_METADATA")
    before = sorted(workdir.rglob("*"))
    with Checkpoints(workdir, read_only=True) as checkpoints:
        part = checkpoints.restore_part({"networks": {"net": {"bias": jax.ShapeDtypeStruct((7,), np.float32)}}})
    np.testing.assert_array_equal(part["networks"]["net"]["bias"], np.ones(7))
    assert sorted(workdir.rglob("*")) == before
    assert "passed over: state/_METADATA" in warnings[0]


def test_another_shape_is_no_damage(workdir):
    changed = like()
    changed.networks["net"]["bias"] = jax.ShapeDtypeStruct((8,), np.float32, sharding=jnp.ones(1).sharding)
    with (
        Checkpoints(workdir) as checkpoints,
        pytest.raises(InputError, match=r"step 9 .*net/bias \[7\] instead of \[8\]"),
    ):
        checkpoints.restore(changed)
    assert not (workdir / "checkpoints_damaged").exists()


def test_sha256sum_reads_the_checksums(workdir):
    command = ["sha256sum", "--check", "--quiet", CHECKSUMS]
    assert subprocess.run(command, cwd=workdir / "checkpoints" / "step_9", check=False).returncode == 0


def test_what_a_killed_process_left_behind_is_removed(workdir):
    left = workdir / "checkpoints" / "step_12.orbax-checkpoint-tmp-1"
    left.mkdir()
    with Checkpoints(workdir, read_only=True) as checkpoints:
        assert checkpoints.latest_step() == 9
    assert left.exists()
    with Checkpoints(workdir) as checkpoints:
        assert checkpoints.latest_step() == 9
        checkpoints.wait()
    assert not left.exists()


def test_a_full_disk_is_one_error_that_names_what_is_complete(workdir, monkeypatch):
    def full(folder, leave_out):
        raise OSError(errno.ENOSPC, "No space left on device", str(folder))

    monkeypatch.setattr(checkpoint, "write_checksums", full)
    checkpoints = Checkpoints(workdir)
    checkpoints.save(state_at(12), 12, {"step": 12})
    message = rf"step 12 .*{workdir}.*: No space left on device; .* step 9 is complete"
    with pytest.raises(StorageError, match=message):
        checkpoints.wait()
    assert_is_step(restore(workdir), 9)
