"""Twelve points: guidance x top-k, samples of one trained generator.

  python -m fvq_jax.sweep --config=configs/generation/guidance.py:from=runs/generator --workdir=DIR

Every point starts from the generator in `from` and takes a single step with a rate of 1e-12, which changes nothing that
matters; then it draws and scores its samples as every evaluation does. The codes and the tokenizer are those of
`configs/generate.py`, unless they are given: --config.data.tokenizer=PATH and so on.
Hardware: two CPU cores. Arguments: `from=WORKDIR`; `samples=N` of each point (default 400).
"""

from configs import common, generate


def get_config(arg=""):
    """A run of one step from the trained generator."""
    args = common.parse_arg(arg, **{"from": "runs/generator", "samples": 400})
    config = generate.get_config()
    config.init_from = args["from"]
    config.steps, config.optim.warmup_steps, config.optim.learning_rate = 1, 0, 1e-12
    config.eval.samples = args["samples"]
    config.log.every_steps = 1
    return config


def sweep():
    """Four guidances, three numbers of codes to draw from."""
    for guidance in (1.0, 1.5, 2.0, 3.0):
        for top_k in (0, 64, 8):
            yield {"eval.guidances": (guidance,), "eval.top_k": top_k}
