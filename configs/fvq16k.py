"""FVQ with 16,384 codes, ImageNet 256 x 256, 16x down-sampling, 40 epochs: the paper's main recipe.

  python -m fvq_jax.main --config=configs/fvq16k.py --workdir=DIR \
      --config.data.tfds_dir=DATA_SETS \
      --config.loss.vgg16_path=vgg16-397923af.pth --config.loss.lpips_path=vgg.pth

Data: `imagenet2012` of TensorFlow Datasets, prepared once in DATA_SETS (docs/data.md); for a folder of pictures
--config.data.source=folder --config.data.train_dir=DIR --config.data.eval_dir=DIR instead of tfds_dir.
Hardware: any number of TPU chips or GPUs that divides the batch of 128.
The paper reports rFID 1.30 and 100 % of the codes used. It has not been trained here yet.
Start: as published (`init_std=0`, `restart_after=0`), since FVQ came into use from every first scale that was tried on
photographs, and codes that start on latents cost 0.3 dB there (docs/results.md, "Usage recovery").
Arguments: `smoke` (seconds on a CPU), `batch=N` (rate 1e-4 x N / 128; more in `common.scale_to_batch`),
`pictures=N` for a folder of N pictures: discriminator, evaluations and checkpoints come after as many epochs as on
ImageNet, where they come after 20,000, 10,000 and 5,000 steps.
"""

from configs import common
from fvq_jax.tasks import default_config


def get_config(arg="", **quantizer):
    """The paper's recipe, as `default_config` holds it, with these settings of the quantizer; then the arguments."""
    args = common.parse_arg(arg, smoke=False, batch=0, pictures=0)
    config = default_config()
    config.eval.every_steps = 10000
    config.tokenizer.quantizer.update(quantizer)
    if args["smoke"]:
        common.shrink_to_smoke(config)
    if args["batch"]:
        common.scale_to_batch(config, args["batch"])
    if args["pictures"]:
        common.scale_to_pictures(config, args["pictures"])
    return config
