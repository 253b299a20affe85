"""FVQ beside its rivals: every quantizer in the same network, with the same data, steps, batch and seed.

  python -m fvq_jax.sweep --config=configs/rivals.py --workdir=DIR --config.data.train_dir=PHOTOS/train \
      --config.data.eval_dir=PHOTOS/val
  python -m fvq_jax.sweep report DIR

For two CPU cores: 4,096 codes, the network and the 32 x 32 crops of photographs.py, 1,000 steps of 32 crops. What the
rivals publish about their quantizer is kept (loss weights, start of the codebook); what they publish about network
and schedule is not, since the quantizer is compared.
Arguments: `rival=NAME` (one of RIVALS), `seeds=N` (the sweep takes seeds 0 to N - 1; 1), `smoke` (seconds), `batch=N`
(rate 1e-3 x N / 32).
"""

from configs import common, photographs
from fvq_jax.runtime.errors import InputError
from fvq_jax.tasks.tokenizer.fields import downsampling, use_quantizer

CODES = 4096
_TABLE = {"codebook_size": CODES, "code_dim": 32}
_LEVELS = {"residual": {"depth": 4}, "multi_scale": {"scales": (1, 2, 3, 4, 6, 8)}}

# (quantizer, its settings)
RIVALS = {
    "none": ("vector", _TABLE | {"bridge": "none"}),
    "ema": ("ema", _TABLE),
    "simvq": ("simvq", _TABLE),
    "linear": ("vector", _TABLE | {"bridge": "linear"}),
    "fsq": ("fsq", {"levels": (8, 8, 8, 8)}),
    "lfq": ("lfq", {"bits": 12}),
    "bsq": ("bsq", {"bits": 12}),
    "ibq": ("ibq", _TABLE),
    "fvq": ("vector", _TABLE | {"bridge": "S/2"}),
    # StableVQ: FVQ with region loss, dynamic estimator and a constant rate of its own for codebook and bridge.
    "stablevq": ("vector", _TABLE | {"bridge": "S/2", "region_window": 20, "estimator": "dynamic"}),
    "residual_none": ("residual", _TABLE | _LEVELS["residual"] | {"bridge": "none"}),
    "residual_fvq": ("residual", _TABLE | _LEVELS["residual"] | {"bridge": "S/2"}),
    "multi_scale_none": ("multi_scale", _TABLE | _LEVELS["multi_scale"] | {"bridge": "none"}),
    "multi_scale_fvq": ("multi_scale", _TABLE | _LEVELS["multi_scale"] | {"bridge": "S/2"}),
}


def get_config(arg=""):
    """The network of the photographs with one of the quantizers; without `rival`, FVQ's."""
    args = _args(arg)
    size = ["smoke"] if args["smoke"] else []
    config = photographs.get_config(",".join([*size, f"batch={args['batch']}"] if args["batch"] else size))
    name, settings = RIVALS[args["rival"]]
    if name == "multi_scale":  # the last scale is the grid of latents, which is another one in the smoke size
        settings = settings | {"scales": (*settings["scales"][:-1], config.data.image_size // downsampling(config))}
    use_quantizer(config, name, **settings)
    if args["rival"] == "stablevq":
        config.optim.codebook_learning_rate = config.optim.learning_rate
        config.optim.codebook_decay = "constant"
    return config


def sweep(arg=""):
    """Every rival with every seed."""
    for seed in range(_args(arg)["seeds"]):
        for rival in RIVALS:
            yield {"argument": f"rival={rival}", "seed": seed}


def _args(arg):
    args = common.parse_arg(arg, rival="fvq", seeds=1, smoke=False, batch=0)
    if args["rival"] not in RIVALS:
        raise InputError(f"unknown rival {args['rival']!r}: use one of {', '.join(RIVALS)}")
    return args
