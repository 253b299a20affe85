"""The settings of generator training beyond the shared ones; the defaults are LlamaGen's size L (arXiv 2406.06525)."""

from ml_collections import ConfigDict

from fvq_jax.models.gpt import GPT, SIZES, hidden_width
from fvq_jax.runtime.fields import Field, Needs

SECTION = "generator"  # of a config, with the settings of the network
SOURCES = ("codes",)
_L = SIZES["L"]
_SAMPLED = (Needs(("eval.samples",)),)
_DRAWN = (*_SAMPLED, Needs(("eval.temperature",)))
_SCORED = (Needs(("eval.samples",), misleading=True),)

_FIELDS: dict[str, Field] = {
    "generator.vocab": Field(16384, "How many codes the tokenizer has.", above=0, stays=True),
    "generator.classes": Field(1000, "How many classes there are.", above=0, stays=True),
    "generator.grid": Field((16, 16), "Rows and columns of the codes of an image.", stays=True),
    "generator.layers": Field(_L.layers, "Layers of the transformer.", above=0, stays=True),
    "generator.width": Field(_L.width, "Channels of the transformer.", above=0, stays=True),
    "generator.heads": Field(_L.heads, "Heads of every attention.", above=0, stays=True),
    "generator.hidden": Field(
        0, "Width of the feed-forward networks; 0: 8/3 of the width, rounded up to a multiple of 256.", stays=True
    ),
    "generator.dropout": Field(0.1, "Dropout of embeddings, attention and feed-forward networks.", below=1),
    "generator.class_dropout": Field(
        0.1, "How often a class is hidden in training; guidance needs a model that was trained so.", below=1, stays=True
    ),
    "generator.path_dropout": Field(
        0.0, "How often the last layer is left out for an image; above 0 it replaces dropout in the layers.", below=1
    ),
    "generator.dtype": Field(
        "bfloat16",
        "Dtype of matrix products; residual stream, norms, softmax, loss and parameters are float32.",
        choices=("bfloat16", "float32"),
        stays=True,
    ),
    "generator.remat": Field(False, "Recompute layers in the backward pass, to save memory."),
    "generator.unroll": Field(
        False, "Compile every layer, not one in a loop: a faster step on a CPU, slower to compile, more memory."
    ),
    "optim.weight_decay": Field(0.05, "AdamW's decay of matrices; vectors, the weights of norms, do not decay."),
    "data.source": Field("codes", "What to train on: codes that were extracted before.", choices=SOURCES, stays=True),
    "data.train_dir": Field("", "Folder of codes to train on, from python -m fvq_jax.tokenize extract."),
    "data.eval_dir": Field("", "Folder of codes to evaluate on."),
    "data.tokenizer": Field("", "Tokenizer that the codes must come from, which is checked; empty: not checked."),
    "eval.images": Field(0, "Images in an evaluation, evenly spaced over the set; 0: the whole set."),
    "eval.samples": Field(
        0, "Samples drawn in an evaluation for every guidance, of all classes; 0: none. They need data.tokenizer."
    ),
    "eval.guidances": Field(
        (1.0, 1.75), "Guidances with which samples are drawn; 1: without guidance.", needs=_SAMPLED
    ),
    "eval.temperature": Field(1.0, "Divides the logits of samples; 0: always the likeliest code.", needs=_SAMPLED),
    "eval.top_k": Field(0, "Draw samples from so many of the likeliest codes; 0: from all.", needs=_DRAWN),
    "eval.top_p": Field(
        1.0, "Draw samples from the likeliest codes that have this probability.", above=0, most=1, needs=_DRAWN
    ),
    "eval.pictures": Field(
        "",
        "Real pictures, photos or a folder with one folder per class, from which a classifier learns to judge samples.",
        needs=_SCORED,
    ),
    "eval.inception": Field(
        "", "File with FID's InceptionV3, see README; empty: no FID of samples while training.", needs=_SCORED
    ),
    "eval.reference": Field(
        "", "File with ADM's reference statistics (.npz), with which samples are compared.", needs=_SCORED
    ),
    "log.images": Field(8, "Samples of each class that an evaluation shows.", above=0, needs=_SAMPLED),
}


def fields() -> dict[str, Field]:
    """All fields of a generator's config beyond the shared ones, by full name."""
    return dict(_FIELDS)


def hidden(config: ConfigDict) -> int:
    """The width of the feed-forward networks."""
    return config.generator.hidden or hidden_width(config.generator.width)


def network(config: ConfigDict, **changes: object) -> GPT:
    """The network that a config describes; `changes` replace arguments of it."""
    settings = config.generator.to_dict()
    return GPT(**(settings | {"grid": tuple(settings["grid"])} | changes))
