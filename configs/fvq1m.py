"""FVQ with 1,048,576 codes of 256 dimensions, ImageNet 256 x 256, 16x down-sampling, 40 epochs.

  python -m fvq_jax.main --config=configs/fvq1m.py --workdir=DIR --config.mesh.codebook=8 \
      --config.data.tfds_dir=DATA_SETS \
      --config.loss.vgg16_path=vgg16-397923af.pth --config.loss.lpips_path=vgg.pth

Hardware: any number of TPU chips or GPUs that divides the batch of 128. The codebook with its moments takes 3 GiB on
every device; --config.mesh.codebook=N divides it by N (docs/scaling.md has the figures). Groups are 16 x 16 codes:
with four times the codes of fvq262k in groups four times as large, the bridge has as many tokens as there.
The paper has no such codebook. It has not been trained here yet.
Data, arguments and the start of the codes: as in fvq16k.
"""

from configs import fvq16k


def get_config(arg=""):
    """fvq16k with a codebook beyond the paper's largest."""
    return fvq16k.get_config(arg, codebook_size=1048576, bridge="L/16")
