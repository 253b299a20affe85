"""Tokenizers that are related to those that are read, but whose networks do not exist here, and why."""

# What they are and the reason, by patterns that names must all match at their start.
REFUSED: dict[tuple[str, ...], str] = {
    (r"encoder\.mid_block\.", r"decoder\.adaptive\."): (
        "an Open-MAGVIT2 tokenizer, whose networks do not exist here: its encoder pads where it halves the picture, "
        "and its decoder scales every level by statistics of the codes (decoder.adaptive) and doubles it by moving "
        'channels; its quantizer does exist, as "lfq"'
    ),
    (r"encoder\.down\.", r"quantize\.used$"): (
        "a VQGAN whose codes were renumbered, which does not exist here: quantize.used lists the codes that are kept"
    ),
    (r"encoder\.down\.", r"quantize\.proj\.", r"quantize\.embed\."): (
        "a VQGAN with a Gumbel quantizer, which does not exist here: a layer (quantize.proj) says how likely each code "
        "is, and nothing is compared with the codes"
    ),
}
