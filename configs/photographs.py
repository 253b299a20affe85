"""Is every code used? A small tokenizer of 4,096 codes on a folder of photographs, and the same without the bridge.

  python -m fvq_jax.sweep --config=configs/photographs.py --workdir=DIR --config.data.train_dir=PHOTOS/train \
      --config.data.eval_dir=PHOTOS/val
  python -m fvq_jax.sweep report DIR

Three runs with the same seed and budget, 1,000 steps of 32 crops: no bridge, a linear one, the paper's. For two CPU
cores: 32 x 32 crops of pictures that were resized to 48..64 pixels, 4x down-sampling, no LPIPS and no discriminator.
Any folders of some hundred pictures will do; docs/results.md says what came out of ours. `fvq_jax.main` with this
config runs the paper's bridge alone. Arguments: `bridge=NAME`, `smoke` (seconds), `batch=N` (rate 1e-3 x N / 32).
"""

from configs import common, quickstart


def get_config(arg=""):
    """The quickstart's network with four times its codes."""
    args = common.parse_arg(arg, bridge="S/2", smoke=False, batch=0)
    config = quickstart.get_config(f"bridge={args['bridge']}")
    config.steps = 1000
    config.tokenizer.quantizer.codebook_size = 4096
    config.data.source = "folder"
    config.data.resize_min, config.data.resize_max = 48, 64
    config.data.flip = True
    config.eval.every_steps = 100
    config.eval.images = 0
    if args["smoke"]:
        common.shrink_to_smoke(config)
    if args["batch"]:
        common.scale_to_batch(config, args["batch"], rate=1e-3, per=32)
    return config


def sweep():
    """Without a bridge, with a linear one, with the paper's."""
    for bridge in ("none", "linear", "S/2"):
        yield {"tokenizer.quantizer.bridge": bridge}
