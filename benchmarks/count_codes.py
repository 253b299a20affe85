"""Which codes of a large codebook are never chosen, among very many tokens.

  python benchmarks/count_codes.py --tokenizer=WORKDIR --data=PHOTOS/train --per-code=256 --out=FILE

`fvq_jax.evaluate --crops` scores pictures too; this script only counts the codes of the same crops. On a CPU it finds
them in a k-d tree, whatever the run did.

It prints one JSON object whenever the tokens for every code have doubled. The counts are in FILE (.npz) after every
5 % of the crops; started again with the same arguments it goes on from there.
"""

import argparse
import dataclasses
import json
import math
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from fvq_jax.data.crops import RandomCrops
from fvq_jax.data.pipeline import eval_batches
from fvq_jax.data.sources import kind_of, make_source
from fvq_jax.inference.saved import load
from fvq_jax.inference.tokenizer import Tokenizer
from fvq_jax.models.quantizers import make_quantizer
from fvq_jax.models.quantizers.vector import VectorQuantizer
from fvq_jax.ops.code_usage import code_statistics, perplexity, position_statistics, usage
from fvq_jax.runtime.errors import InputError

SAVES = 20


class Counter:
    """The codes of pictures, counted; `first` is the first crop that is not counted yet."""

    def __init__(self, tokenizer, trained):
        self.tokenizer, self.positions = tokenizer, trained.positions()
        self.counts, self.first = np.zeros(tokenizer.net.quantizer.size, np.int64), 0

    def add(self, images, mask):
        """Counts the codes of the pictures of a batch that the mask [b] has."""
        codes = self.tokenizer.encode(images)[mask]
        self.counts += np.bincount(codes.reshape(-1), minlength=len(self.counts))

    def row(self):
        """What the counts say so far."""
        n, k = int(self.counts.sum()), len(self.counts)
        pixels = float(self.tokenizer.downsampling**2)
        return {
            "tokens": n,
            "codes": k,
            "tokens_per_code": n / k,
            "usage": float(usage(self.counts)),
            **code_statistics(self.counts, pixels, k),
            **position_statistics(self.counts, self.positions),
            "perplexity": float(perplexity(jnp.asarray(self.counts))),
        }


def count(args):
    """Yields a row whenever the tokens for every code have doubled, and at the end."""
    if args.per_code < 1 or args.batch < 1:
        raise InputError("--per-code and --batch must be at least 1")
    tokenizer, config = load_with_tree(args.tokenizer), Path(args.tokenizer, "config.json")
    trained = tokenizer.trained_net.quantizer
    if config.exists():  # of a run, which knows the bridge's groups; what is loaded of it has only the table
        trained = make_quantizer(json.loads(config.read_text())["tokenizer"]["quantizer"])
    counter = Counter(tokenizer, trained)
    tokens = math.prod(tokenizer.code_shape(args.size, args.size))
    total = -(-args.per_code * len(counter.counts) // tokens)
    source = make_source(kind_of(args.data), "eval", image_size=args.size, eval_dir=args.data, eval_images=0)
    crops = RandomCrops(source, total, args.size, args.resize_min, args.resize_max, seed=args.seed)
    what = f"{crops.fingerprint()} by {tokenizer.fingerprint}"
    if args.out.exists():
        saved = np.load(args.out)
        if str(saved["what"]) != what:
            raise InputError(f"{args.out} has the counts of other crops or another tokenizer: name another file")
        counter.counts, counter.first = saved["counts"], int(saved["first"])
    if counter.first == total:
        yield counter.row()
        return
    start, since, saved_at = time.monotonic(), counter.first, counter.first
    shown = max(1, counter.counts.sum() // len(counter.counts))
    rest = Rest(crops, counter.first)
    options = {"num_workers": args.workers, "pictures": crops.pictures}
    for batch in eval_batches(rest, image_size=args.size, batch_size=args.batch, **options):
        counter.add(batch["image"], batch["mask"])
        counter.first = min(total, counter.first + args.batch)
        done = counter.first == total
        if done or counter.first - saved_at >= total / SAVES:
            saved_at = counter.first
            save(args.out, what=what, counts=counter.counts, first=counter.first)
        if done or counter.counts.sum() >= 2 * shown * len(counter.counts):
            shown = counter.counts.sum() // len(counter.counts)
            rate = (counter.first - since) * tokens / (time.monotonic() - start)
            yield counter.row() | {"tokens_per_second": round(rate)}


def load_with_tree(path):
    """The tokenizer at a path, with the search by a k-d tree. InputError if it searches no single table."""
    saved = load(path)
    if not isinstance(saved.net.quantizer, VectorQuantizer) or saved.net.quantizer.classes:
        raise InputError(f"{path} has no single table of which the nearest row is the code")
    quantizer = saved.net.quantizer.clone(search_implementation="tree")
    return Tokenizer(dataclasses.replace(saved, net=saved.net.clone(quantizer=quantizer)))


class Rest:
    """The records of a source from one on."""

    def __init__(self, source, first):
        self._source, self._first = source, first

    def __len__(self):
        return len(self._source) - self._first

    def __getitem__(self, index):
        return self._source[self._first + index]

    def name(self, index):
        """What to call a record."""
        return self._source.name(self._first + index)

    def fingerprint(self):
        """Changes with the records."""
        return f"{self._source.fingerprint()} from {self._first} on"


def save(path, **arrays):
    """Writes the file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part.npz")
    np.savez(part, **arrays)
    part.replace(path)


def parse(arguments):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", required=True, help="a workdir, an exported tokenizer, or a published file")
    parser.add_argument("--data", required=True, help="a folder of pictures")
    parser.add_argument("--out", required=True, type=Path, help="the file of the counts, .npz")
    parser.add_argument("--per-code", type=int, default=256, help="tokens for every code")
    parser.add_argument("--size", type=int, default=64, help="side of the crops, pixels")
    parser.add_argument("--resize-min", type=int, default=96, help="shorter side before cropping; 0: as stored")
    parser.add_argument("--resize-max", type=int, default=192)
    parser.add_argument("--seed", type=int, default=0, help="of the crops")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--workers", type=int, default=0, help="processes that cut crops; 0: threads")
    return parser.parse_args(arguments)


def main():
    """Counts, or says in one line why not."""
    try:
        for row in count(parse(sys.argv[1:])):
            sys.stdout.write(json.dumps(row) + "\n")
            sys.stdout.flush()
    except InputError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
