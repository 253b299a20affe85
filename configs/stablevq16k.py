"""The recipe of StableVQ (arXiv 2609.26774) with 16,384 codes: fvq16k with three parts that keep codes alive.

  python -m fvq_jax.main --config=configs/stablevq16k.py --workdir=DIR \
      --config.data.tfds_dir=DATA_SETS \
      --config.loss.vgg16_path=vgg16-397923af.pth --config.loss.lpips_path=vgg.pth

The region loss in place of the codebook loss, the dynamic estimator, and a constant rate of 1e-3 for codebook and
bridge beside the annealed 1e-4 of the rest (warm-up 10 % of the steps, hold 27 %). Two things are not published: the
window of the region loss (here 20 steps), and whether the bridge shares the rate of the codebook (here it does). The
paper's discriminator stands on DINO features; here it is that of fvq16k.
The paper reports rFID 1.22 and 100 % of the codes used after 40 epochs. It has not been trained here yet.
Data, hardware and arguments: as in fvq16k.
"""

from configs import fvq16k


def get_config(arg=""):
    """fvq16k with region loss, dynamic estimator and a rate of its own for codebook and bridge."""
    config = fvq16k.get_config(arg, region_window=20, estimator="dynamic")
    config.optim.codebook_learning_rate = 10 * config.optim.learning_rate
    config.optim.codebook_decay = "constant"
    return config
