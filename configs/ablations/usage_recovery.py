"""Does the codebook come to be used whatever its first scale? Twenty points: four quantizers, five scales.

  python -m fvq_jax.sweep --config=configs/ablations/usage_recovery.py --workdir=DIR \
      --config.data.train_dir=PHOTOS/train --config.data.eval_dir=PHOTOS/val
  python -m fvq_jax.sweep report DIR

StableVQ (arXiv 2609.26774) starts the raw codebook with standard deviations from 1e-5 to 1e-1 and finds that FVQ loses
its full use where the scale is wrong, and SimVQ nearly all of it; its figure of merit is the mean usage over training,
mean over the scales: SimVQ 2.17 %, FVQ 8.08 %, with the region loss and the rest of StableVQ 60.59 %. Its grid and
length are not published; ours are five powers of ten and the 1,000 steps of photographs.py, with usage over windows of
32 steps, 65,536 tokens. The column "Mean usage of the windows in training" of the report is
the inner mean. The fourth quantizer is no part of that paper: FVQ whose codes start on latents (`restart_after`).
What came out with 500 steps: docs/results.md.
Arguments: `kind=simvq|fvq|region|restart`, `smoke` (seconds).
"""

from configs import common, rivals
from fvq_jax.runtime.errors import InputError

KINDS = ("simvq", "fvq", "region", "restart")
SCALES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
WINDOW = 20  # steps after which the region loss pulls a code that was not chosen
RESTART = 8.0  # tokens per code after which a code that was not chosen starts again on a latent


def get_config(arg=""):
    """The photographs with one of the quantizers."""
    args = common.parse_arg(arg, kind="fvq", smoke=False)
    kind = args["kind"]
    if kind not in KINDS:
        raise InputError(f"unknown kind {kind!r}: use one of {', '.join(KINDS)}")
    rival = "simvq" if kind == "simvq" else "fvq"
    config = rivals.get_config(f"rival={rival}{',smoke' if args['smoke'] else ''}")
    if kind == "region":
        config.tokenizer.quantizer.region_window = WINDOW
    if kind == "restart":
        config.tokenizer.quantizer.restart_after = RESTART
    if not args["smoke"]:
        config.log.every_steps = 32
    return config


def sweep():
    """Every quantizer at every scale of its raw codebook."""
    for kind in KINDS:
        for scale in SCALES:
            yield {"argument": f"kind={kind}", "tokenizer.quantizer.init_std": scale}
