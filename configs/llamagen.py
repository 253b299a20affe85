"""LlamaGen on the codes of a tokenizer: class-conditional generation of ImageNet (arXiv 2406.06525, 2509.10140).

  python -m fvq_jax.main --config=configs/llamagen.py:size=L --workdir=DIR \
      --config.data.train_dir=CODES/train --config.data.eval_dir=CODES/val

Data: codes that `python -m fvq_jax.tokenize extract` wrote, or those of LlamaGen's own program.
Hardware: any number of TPU chips or GPUs that divides the batch; docs/scaling.md says what each size needs.
FVQ reports FID 2.39 for L and 2.07 for XL. They have not been trained here yet.

Arguments:
  size=B|L|XL|XXL|3B|tiny     `tiny` is for a CPU.
  recipe=fvq|llamagen         fvq: batch 2048 and 300 epochs up to size L, 1024 and 350 above, rate 1e-4 x batch / 256
                              for 5 % of the steps, then falling linearly to 1 % of it. llamagen: batch 256, 300 epochs,
                              rate 1e-4 throughout. Neither has a warm-up.
  vocab=N, image=256|384      codes of the tokenizer, and side of its images, of which a code covers 16 x 16 pixels.
  smoke                       seconds on a CPU; codes of any tokenizer, whose vocabulary and grid are set as fields.
  batch=N                     another batch, with rate 1e-4 x N / 256 (more in `common.scale_to_batch`).
"""

from configs import common
from fvq_jax.models.gpt import SIZES, Size
from fvq_jax.runtime.errors import InputError, require
from fvq_jax.tasks import default_config

RECIPES = ("fvq", "llamagen")
ALL_SIZES = SIZES | {"tiny": Size(4, 256, 4)}
DOWNSAMPLING = 16
_RATE, _PER = 1e-4, 256


def get_config(arg=""):
    """The network of a size, and a published recipe."""
    args = common.parse_arg(arg, size="L", recipe="fvq", vocab=16384, image=256, smoke=False, batch=0)
    size, recipe, image = args["size"], args["recipe"], args["image"]
    require(size in ALL_SIZES, f"config argument 'size' must be one of {', '.join(ALL_SIZES)}, not {size!r}")
    require(recipe in RECIPES, f"config argument 'recipe' must be one of {', '.join(RECIPES)}, not {recipe!r}")
    if image % DOWNSAMPLING:
        raise InputError(f"config argument 'image' must be a multiple of {DOWNSAMPLING}, such as 256, not {image}")

    config = default_config("generator")
    shape = ALL_SIZES[size]
    config.generator.layers, config.generator.width, config.generator.heads = shape.layers, shape.width, shape.heads
    config.generator.vocab = args["vocab"]
    config.generator.grid = (image // DOWNSAMPLING, image // DOWNSAMPLING)

    config.optim.warmup_steps, config.optim.warmup_epochs = 0, 0.0
    if recipe == "fvq":
        large = size in ("XL", "XXL", "3B")
        config.batch_size, config.epochs = (1024, 350.0) if large else (2048, 300.0)
        config.optim.decay, config.optim.hold, config.optim.end_factor = "linear", 0.05, 0.01
    else:
        config.batch_size, config.epochs = 256, 300.0
        config.optim.decay = "constant"
    config.optim.learning_rate = _RATE * config.batch_size / _PER
    config.eval.batch_size = 256
    config.eval.every_steps = 25000
    if args["smoke"]:
        common.shrink_generator_to_smoke(config)
    if args["batch"]:
        common.scale_to_batch(config, args["batch"], rate=_RATE, per=_PER)
    return config
