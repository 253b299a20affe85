"""A small generator in minutes on two CPU cores: pictures like the ten bundled photographs, on the quickstart's codes.

  make generate

Trains on codes of random 32 x 32 crops of the photographs (64 codes a crop, one class for every photograph), and
predicts the codes of regions it never saw. Then it draws samples of every class without and with guidance, and a
classifier that has learned from real crops says whether they look like their class. The README has the results.
Arguments: `smoke` (seconds), `batch=N` (rate 2e-3 x N / 64).
"""

from configs import common
from fvq_jax.tasks import default_config


def get_config(arg=""):
    """A transformer of 4 layers on 8 x 8 codes of 1,024."""
    args = common.parse_arg(arg, smoke=False, batch=0)
    config = default_config("generator")
    config.steps, config.epochs = 600, 0.0
    config.batch_size = 64

    config.generator.vocab = 1024
    config.generator.classes = 10
    config.generator.grid = (8, 8)
    config.generator.layers, config.generator.width, config.generator.heads = 4, 128, 4
    config.generator.dtype, config.generator.unroll = "float32", True

    config.optim.learning_rate = 2e-3
    config.optim.warmup_steps, config.optim.warmup_epochs = 30, 0.0
    config.optim.hold, config.optim.end_factor = 0.0, 0.01

    config.data.train_dir = "runs/codes/train"
    config.data.eval_dir = "runs/codes/held_out"
    config.data.tokenizer = "runs/quickstart"
    config.data.num_workers = 0

    config.eval.samples = 400
    config.eval.guidances = (1.0, 1.5, 2.0, 3.0)
    config.eval.pictures = "photos"
    config.checkpoint.every_steps = 200
    config.log.every_steps = 20
    if args["smoke"]:
        config.steps, config.optim.warmup_steps = 4, 1
        config.batch_size = config.eval.batch_size = 16
        config.generator.layers, config.generator.width, config.generator.heads = 2, 64, 2
        config.eval.images, config.eval.samples, config.eval.guidances = 64, 20, (1.0, 2.0)
        config.checkpoint.every_steps, config.log.every_steps = 2, 1
    if args["batch"]:
        common.scale_to_batch(config, args["batch"], rate=2e-3, per=64)
    return config
