"""How 262,144 codes are laid out on N devices (8 unless given): data x codebook, for every power of two that divides N.

  python -m fvq_jax.sweep --config=configs/ablations/mesh.py:devices=8 --workdir=DIR --config.data.tfds_dir=DATA_SETS \
      --config.loss.vgg16_path=vgg16-397923af.pth --config.loss.lpips_path=vgg.pth
  JAX_NUM_CPU_DEVICES=8 python -m fvq_jax.sweep --config=configs/ablations/mesh.py:smoke --workdir=DIR

Nothing but the order of sums changes, so quality is the same, and the figures to look at are time and memory. A point
needs exactly N devices; with another number it is refused, and named. Each point is a short run.
Hardware: N TPU chips or GPUs of one host; with `smoke` a CPU that simulates them; its times mean nothing.
Arguments: `smoke` (1,024 codes), `devices=N`.
"""

from configs import common, fvq262k
from configs.ablations import base


def get_config(arg=""):
    """The paper's largest codebook for 200 steps, or a small one."""
    if _args(arg)["smoke"]:
        config = base.get_config("smoke")
        config.tokenizer.quantizer.codebook_size, config.tokenizer.quantizer.bridge = 1024, "S/2"
        return config
    config = fvq262k.get_config()
    config.steps, config.epochs = 200, 0.0
    config.optim.warmup_steps, config.optim.warmup_epochs = 20, 0.0
    config.eval.images = 512
    return config


def sweep(arg=""):
    """From copies of the whole codebook to one copy in N parts."""
    devices = _args(arg)["devices"] or 8
    codebook = 1
    while devices % codebook == 0:
        yield {"mesh.data": devices // codebook, "mesh.codebook": codebook}
        codebook *= 2


def _args(arg):
    return common.parse_arg(arg, smoke=False, devices=0)
