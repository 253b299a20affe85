"""What every ablation starts from: the paper's recipe for 16,384 codes (`fvq16k`), or a size for two CPU cores.

The other files of this folder replace a few fields of it. Each is started by

  python -m fvq_jax.sweep --config=configs/ablations/NAME.py --workdir=DIR --config.data.tfds_dir=DATA_SETS \
      --config.loss.vgg16_path=vgg16-397923af.pth --config.loss.lpips_path=vgg.pth
  python -m fvq_jax.sweep --config=configs/ablations/NAME.py:smoke --workdir=DIR
  python -m fvq_jax.sweep report DIR

Hardware: as for fvq16k. With `smoke`, two CPU cores: 150 steps of 16 bundled 32 x 32 crops, 256 codes of 16 dimensions,
no LPIPS, no discriminator. That is enough to tell a used codebook from a collapsed one, not to rank what is close.
Arguments: `smoke`.
"""

from configs import common, fvq16k, quickstart


def get_config(arg=""):
    """The recipe in the paper's size or the small one."""
    if not is_smoke(arg):
        return fvq16k.get_config()
    config = quickstart.get_config("bridge=S/2,batch=16")
    config.steps, config.optim.warmup_steps = 150, 15
    config.optim.learning_rate = 1e-3
    config.tokenizer.z_channels = 32
    config.tokenizer.quantizer.codebook_size = 256
    config.tokenizer.quantizer.code_dim = 16
    config.eval.images = 256
    config.eval.every_steps = config.checkpoint.every_steps = 50
    config.log.every_steps = 10
    return config


def is_smoke(arg):
    """Whether the small size is asked for. InputError for an unknown argument."""
    return common.parse_arg(arg, smoke=False)["smoke"]
