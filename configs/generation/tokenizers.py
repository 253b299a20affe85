"""Three points: the same small generator on the codes of three tokenizers, which differ in their bridge.

Does a better used codebook give better samples at equal budget? The tokenizers are those of `ablations/base.py:smoke`
with no bridge, a linear one and the paper's; docs/sweeps.md has the commands that train them and extract their codes
into DIR, and then

  python -m fvq_jax.sweep --config=configs/generation/tokenizers.py:from=DIR --workdir=SWEEP

Bits per code compare only with the unigram and bigram beside them, since the codes differ; class accuracy compares.
Hardware: two CPU cores. Arguments: `from=DIR`; `steps=N` (default 300).
"""

from configs import common, generate

TOKENIZERS = {"none": "none", "linear": "linear", "S-2": "S/2"}  # folders in DIR, and their bridges


def get_config(arg=""):
    """The generator of `generate.py`, with a vocabulary for the codes of `ablations/base.py:smoke`."""
    args = _args(arg)
    config = generate.get_config()
    config.steps = args["steps"]
    config.generator.vocab = 256
    config.generator.grid = (8, 8)
    config.checkpoint.every_steps = 100
    return config


def sweep(arg=""):
    """A point for every tokenizer."""
    folder = _args(arg)["from"]
    for name in TOKENIZERS:
        yield {
            "data.tokenizer": f"{folder}/{name}/tokenizer",
            "data.train_dir": f"{folder}/{name}/train",
            "data.eval_dir": f"{folder}/{name}/held_out",
        }


def _args(arg):
    return common.parse_arg(arg, **{"from": "runs/tokenizers", "steps": 300})
