"""A tokenizer of your own pictures: tens to thousands of them, on two CPU cores, without any weight file.

  python -m fvq_jax.main --config=configs/small.py --workdir=runs/mine \
      --config.data.train_dir=PICTURES --config.data.eval_dir=OTHERS

OTHERS are pictures to score, which the tokenizer should not train on; with the same folder twice the scores say only
how well it knows what it has seen. The quickstart's network and 1,024 codes, which start on latents, so that all are
used although there is little to learn from. Every picture is resized to 1 to 1.5 times the crop and cut at random.
Arguments: `size=N` (side of the crops, a multiple of 4; 64), `smoke` (seconds), `batch=N` (rate 1e-3 x N / the batch
without it). A step sees 32,768 pixels at any size up to 128, so that it always takes about as long.
"""

from configs import common, quickstart

_PIXELS = 32 * 32 * 32  # in a step


def get_config(arg=""):
    """The quickstart's network on a folder."""
    args = common.parse_arg(arg, size=64, smoke=False, batch=0)
    size, batch = args["size"], max(2, _PIXELS // args["size"] ** 2)
    config = quickstart.get_config()
    config.steps, config.optim.warmup_steps = 1000, 100
    config.batch_size = config.eval.batch_size = batch
    config.tokenizer.quantizer.restart_after = 2.0
    config.data.source = "folder"
    config.data.image_size = size
    config.data.resize_min, config.data.resize_max = size, size * 3 // 2
    config.data.flip = True
    config.eval.images = 0
    if args["smoke"]:
        common.shrink_to_smoke(config)
    if args["batch"]:
        common.scale_to_batch(config, args["batch"], rate=1e-3, per=config.batch_size)
    return config
