"""FVQ with 65,536 codes of 512 dimensions, ImageNet 256 x 256, 16x down-sampling, 120 epochs.

  python -m fvq_jax.main --config=configs/fvq65k.py --workdir=DIR \
      --config.data.tfds_dir=DATA_SETS \
      --config.loss.vgg16_path=vgg16-397923af.pth --config.loss.lpips_path=vgg.pth

Hardware: any number of TPU chips or GPUs that divides the batch of 128; --config.mesh.codebook=N shards the
codebook and its moments over N of them. Groups are 8 x 8 codes, since a larger codebook wants larger groups.
The paper reports rFID 1.00 and 100 % of the codes used. It has not been trained here yet.
Data, arguments and the start of the codes: as in fvq16k.
"""

from configs import fvq16k


def get_config(arg=""):
    """fvq16k with a larger codebook."""
    config = fvq16k.get_config(arg, codebook_size=65536, code_dim=512, bridge="L/8")
    if config.epochs:  # not in the smoke size
        config.epochs = 120.0
    return config
