"""How many codes come to be used, for so many codes, such groups and so many tokens? Eighteen points, short runs.

  python -m fvq_jax.sweep --config=configs/ablations/usage_law.py --workdir=DIR \
      --config.data.train_dir=PHOTOS/train --config.data.eval_dir=PHOTOS/val
  python -m fvq_jax.sweep report DIR

The network of full_codebook.py, one for all points, 4,096 tokens in a step; 4,096 to 65,536 codes in groups of 2 x 2 to
16 x 16, each with the published start and with codes that start on latents (`restart_after`). Usage is counted over
windows of 32 steps, 131,072 tokens, of which even use would show 100 % of 4,096 codes, 99.97 % of 16,384 and 86.5 % of
65,536; and twice, of 262,144 tokens of random crops of other pictures. Hardware: two CPU cores.
What came out of nine of them: docs/results.md, "Codes, groups, tokens"; the others have not been run yet.
Arguments: `smoke` (seconds a point).
"""

from configs import common, full_codebook

GROUPS = {4096: (2, 4, 8), 16384: (2, 4, 8), 65536: (4, 8, 16)}  # codes: sides of the groups, at most 4,096 groups
RESTART = 2.0  # tokens per code after which a code that was not chosen starts again on a latent


def get_config(arg=""):
    """16,384 codes, in short."""
    args = common.parse_arg(arg, smoke=False)
    config = full_codebook.get_config("codes=16384,smoke" if args["smoke"] else "codes=16384")
    if not args["smoke"]:
        config.steps, config.optim.warmup_steps = 256, 26
        config.log.every_steps = 32
        config.eval.every_steps = config.checkpoint.every_steps = 128
    return config


def sweep():
    """Every size with every group that the bridge can attend among, started both ways."""
    for codes, patches in GROUPS.items():
        for patch in patches:
            for restart_after in (0.0, RESTART):
                yield {
                    "tokenizer.quantizer.codebook_size": codes,
                    "tokenizer.quantizer.bridge": f"S/{patch}",
                    "tokenizer.quantizer.restart_after": restart_after,
                }
