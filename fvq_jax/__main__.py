"""Command line: `python -m fvq_jax` lists the commands."""

import sys

COMMANDS = {
    "main": "trains what a config file describes, and goes on where an earlier start of it was stopped.",
    "evaluate": "scores a trained tokenizer, or samples of a generator, and writes a page about it.",
    "tokenize": "turns pictures into codes, for a file or to train a generator on, and codes into pictures.",
    "sample": "draws pictures from a trained generator.",
    "convert": "converts tokenizers between this package's layout and those of PyTorch programs.",
    "plan": "says what a training step needs and how fast it can be, without data and without the hardware.",
    "sweep": "runs a config many times with a few fields varied, and gathers the results.",
    "data.prepare": "packs a folder of pictures into files that are read fast.",
}


def main() -> int:
    """Lists the commands; returns the exit code."""
    width = max(map(len, COMMANDS))
    lines = [f"  python -m fvq_jax.{name:{width}}  {what}" for name, what in COMMANDS.items()]
    sys.stdout.write("Commands of fvq_jax (each explains itself with --help):\n" + "\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
