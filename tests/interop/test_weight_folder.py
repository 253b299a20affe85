import pytest

from fvq_jax.interop.weight_folder import weights_in
from fvq_jax.runtime.errors import InputError

PARTS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["config.json", "model.safetensors", "README.md"], "model.safetensors"),
        (["diffusion_pytorch_model.safetensors"], "diffusion_pytorch_model.safetensors"),
        (["pytorch_model.bin", "training_args.bin", "scheduler.pt", "rng_state.pth"], "pytorch_model.bin"),
        ([*PARTS, "model.safetensors.index.json"], "model.safetensors.index.json"),
        (["config.json", "vq_ds16_c2i.pt"], "vq_ds16_c2i.pt"),
        (["tokenizer.ckpt"], "tokenizer.ckpt"),
        (["config.json", "weights.npz"], None),
        ([], None),
    ],
)
def test_the_file_of_weights_is_found(names, found, tmp_path):
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / "model.ckpt").mkdir()  # a folder is no file
    assert weights_in(tmp_path) == (found and tmp_path / found)


@pytest.mark.parametrize("names", [["model.safetensors", "pytorch_model.bin"], ["a.pt", "b.ckpt"]])
def test_several_are_refused_by_name(names, tmp_path):
    for name in [*names, "config.json"]:
        (tmp_path / name).touch()
    with pytest.raises(
        InputError, match=f"holds several files of weights: give the path of one of {', '.join(names)}$"
    ):
        weights_in(tmp_path)


def test_parts_need_their_index(tmp_path):
    for name in PARTS:
        (tmp_path / name).touch()
    with pytest.raises(InputError, match=r"holds parts of a file of weights, and not the index model\.safetensors"):
        weights_in(tmp_path)
