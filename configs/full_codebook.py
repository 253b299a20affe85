"""Is every code of a large codebook used? A shallow tokenizer that sees many tokens per second on two CPU cores.

  python -m fvq_jax.main --config=configs/full_codebook.py:codes=16384 --workdir=DIR \
      --config.data.train_dir=PHOTOS/train --config.data.eval_dir=PHOTOS/val
  python -m fvq_jax.evaluate --workdir=DIR --data=PHOTOS/val --crops=4096 --out=DIR/val

64 x 64 crops of pictures whose shorter side was resized to 96..192 pixels, 8 dimensions, no LPIPS and no discriminator.
Down-sampling is 4x, 256 tokens a crop, and 2x, 1,024 tokens, for the largest codebooks, which need so many. The
bridge's groups grow with the codebook, as in the paper: S/4 for 16,384 codes, S/8 up to 262,144, S/16 above. Codes
start on latents, and so do again those that are not chosen for long;
`--config.tokenizer.quantizer.restart_after=0` is the published start. Usage means little below some ten tokens for
every code: the second command counts 1,048,576, and its page says how much of the codebook even use would show. The
run's own evaluations, five of them, score 16 tokens for every code, 4 above 65,536 codes; its page draws their usage.
Above 65,536 codes a CPU finds the nearest one in a k-d tree; a GPU or TPU has its kernel all the same.

What came out so far: docs/results.md, "Large codebooks". As a sweep it runs beside no bridge and a linear one:

  python -m fvq_jax.sweep --config=configs/full_codebook.py:codes=16384,seeds=2 --workdir=DIR \
      --config.data.train_dir=PHOTOS/train --config.data.eval_dir=PHOTOS/val

Arguments: `codes=N`, `bridge=NAME`, `seeds=N` (the sweep takes seeds 0 to N - 1; 1), `smoke` (seconds), `batch=N` (rate
1e-3 x N / 16). Another seed: `--config.seed=N`.
"""

from configs import common, quickstart

# (most codes, side of the bridge's groups, widths of the network, one a resolution, training steps)
SIZES = (
    (4096, 2, (1, 1, 1), 2000),
    (16384, 4, (1, 1, 1), 3000),
    (65536, 8, (1, 1, 1), 5000),
    (262144, 8, (1, 1), 4000),
    (1048576, 16, (1, 1), 4000),
)


def get_config(arg=""):
    """The quickstart with less network and more codes."""
    args = _args(arg)
    _, patch, ch_mult, steps = next((size for size in SIZES if args["codes"] <= size[0]), SIZES[-1])
    config = quickstart.get_config(f"bridge={args['bridge'] or f'S/{patch}'}")
    config.steps, config.optim.warmup_steps = steps, steps // 10
    config.batch_size = config.eval.batch_size = 16
    config.tokenizer.ch_mult = ch_mult
    config.tokenizer.z_channels = 32
    config.tokenizer.quantizer.codebook_size = args["codes"]
    config.tokenizer.quantizer.code_dim = 8
    config.tokenizer.quantizer.restart_after = 2.0
    config.data.source = "folder"
    config.data.image_size = 64
    config.data.resize_min, config.data.resize_max = 96, 192
    config.data.flip = True
    # So many that even use would show nearly every code: 16 tokens for every code, 4 for the largest codebooks. So the
    # scores of two sizes are of different crops.
    tokens = (config.data.image_size // 2 ** (len(ch_mult) - 1)) ** 2
    crops = (16 if args["codes"] <= 65536 else 4) * args["codes"] // tokens
    config.eval.images, config.eval.crops = 0, max(1, crops)
    if args["smoke"]:
        common.shrink_to_smoke(config)
    if args["batch"]:
        common.scale_to_batch(config, args["batch"], rate=1e-3, per=16)
    if config.tokenizer.quantizer.codebook_size > 65536:  # with fewer a tree takes longer than comparing all
        config.tokenizer.quantizer.search_implementation = "tree"
    if not args["smoke"]:
        config.eval.every_steps = steps // 5
    return config


def sweep(arg=""):
    """The bridge of this size, no bridge and a linear one, each with every seed."""
    bridges = dict.fromkeys((get_config(arg).tokenizer.quantizer.bridge, "none", "linear"))
    for seed in range(_args(arg)["seeds"]):
        for bridge in bridges:
            yield {"tokenizer.quantizer.bridge": bridge, "seed": seed}


def _args(arg):
    return common.parse_arg(arg, codes=16384, bridge="", seeds=1, smoke=False, batch=0)
