"""A complete FVQ tokenizer in minutes on two CPU cores: 1,024 codes, 32 x 32 crops, 4x down-sampling.

  make quickstart
  python -m fvq_jax.main --config=configs/quickstart.py --workdir=runs/quickstart

Trains on the photographs that ship inside scikit-image and scikit-learn, and scores 2,048 crops of picture
regions it never saw. No LPIPS and no discriminator: neither pays off in so few steps. The README has the results.
Arguments: `bridge=NAME` (`bridge=none` is the plain VQ network, for comparison), `smoke` (seconds), `batch=N`
(rate 1e-3 x N / 32).
"""

from configs import common
from fvq_jax.tasks import default_config


def get_config(arg=""):
    """Small networks, the paper's bridge and annealing."""
    args = common.parse_arg(arg, bridge="S/2", smoke=False, batch=0)
    config = default_config()
    config.steps, config.epochs = 600, 0.0
    config.batch_size = 32

    config.tokenizer.ch = 32
    config.tokenizer.ch_mult = (1, 1, 2)
    config.tokenizer.num_res_blocks = 1
    config.tokenizer.z_channels = 64
    config.tokenizer.quantizer.codebook_size = 1024
    config.tokenizer.quantizer.code_dim = 32
    config.tokenizer.quantizer.bridge = args["bridge"]
    config.tokenizer.dtype = "float32"

    config.loss.perceptual_weight = 0.0
    config.adversarial.weight = 0.0

    config.optim.learning_rate = 1e-3
    config.optim.warmup_steps, config.optim.warmup_epochs = 60, 0.0

    config.data.source = "photos"
    config.data.image_size = 32
    config.data.resize_min = config.data.resize_max = 0
    config.data.num_workers = 0

    config.eval.images = 2048
    config.eval.every_steps = 200
    config.checkpoint.every_steps = 200
    config.log.every_steps = 20
    config.log.images = 16
    if args["smoke"]:
        common.shrink_to_smoke(config)
    if args["batch"]:
        common.scale_to_batch(config, args["batch"], rate=1e-3, per=32)
    return config
