"""Nearest-code search: which code is closest to each latent, without ever building a [tokens, codes] array.

This module defines the score and its precision, and picks the program that computes it: a kernel on a TPU
(`nearest_tpu.py`) or a GPU (`nearest_gpu.py`), a program for CPUs (`nearest_cpu.py`) or a tree (`nearest_tree.py`), an
XLA scan elsewhere (`nearest_xla.py`). All give candidates, and this module chooses the code among them. Pure functions
of arrays on one device; `ops/sharded_codebook.py` runs the same search on the rows that each device holds.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fvq_jax.ops import nearest_cpu, nearest_gpu, nearest_tpu, nearest_tree, nearest_xla, split_matmul, vectors

# Passes of a bfloat16 matrix unit that the scores take: the cost of a search on a TPU.
PASSES = {**split_matmul.PASSES, "bf16_rescored": 1}
IMPLEMENTATIONS = ("auto", "xla", "tree")
RESCORED = 8  # candidates of a token that `bf16_rescored` scores again


def nearest_code(
    z: Float[Array, "n d"],
    codebook: Float[Array, "k d"],
    *,
    block_size: int | None = None,
    l2_normalize: bool = False,
    inner_product: bool = False,
    precision: str = "highest",
    implementation: str = "auto",
) -> Int[Array, "n"]:
    """Finds, for every latent, the index of the code at the smallest Euclidean distance.

    Codes are visited in blocks, so the largest temporary is [n, block_size] in float32, on a CPU a part of it or 4 MiB
    of codes; the kernels keep scores on the chip; a tree holds all codes in float32 and float64. Scores are
    |e - m|^2 - 2 (z - m).(e - m) with m the mean code: the shift leaves distances as they are and keeps digits when
    codes lie close together far from the origin, as bridged codes do early in training.

    Args:
      z: latents, float32 or bfloat16.
      codebook: the table that is searched, float32 or bfloat16.
      block_size: codes per block of the XLA scan (default 512), or of the search on a CPU (default 16 to 128: every
        token reads one block twice); any positive number, k need not be a multiple of it. The kernels have tiles of
        their own.
      l2_normalize: compare directions: both sides are scaled to unit length first.
      inner_product: find the code with the largest z.e instead. The scores are -z.(e - m).
      precision: of the products z.e; everything else is float32.
        highest: float32, on a GPU made of six bfloat16 products. Picks another code than exact arithmetic only
        where two distances agree to about 7 digits.
        bf16_3x: three bfloat16 products, about 16 bits.
        bf16: one bfloat16 product. Of a hundred tokens one (256 dimensions) to seven (8) get a nearly nearest code,
          see docs/results.md.
        bf16_rescored: as bf16, and then the best 8 of 128 or more candidates are scored again in float32.
      implementation: auto (a kernel on TPU and NVIDIA GPU, on a CPU a program of its own for few dimensions), xla
        (the scan everywhere), or tree (as auto, but on a CPU a k-d tree, in float64 whatever the precision: for very
        many codes of few dimensions).

    Returns:
      int32 [n]. Ties go to the lowest index; a tree keeps to that among equal codes only. No gradient.

    Raises:
      ValueError: block_size below 1, an unknown precision or implementation, a tree for inner products.

    Source: arXiv 1711.00937, Eq. 1.
    """
    z, codebook = jax.lax.stop_gradient((z, codebook))
    center = mean_code(codebook, l2_normalize)
    _, index = search(
        z,
        codebook,
        center,
        block_size=block_size,
        l2_normalize=l2_normalize,
        inner_product=inner_product,
        precision=precision,
        implementation=implementation,
    )
    return index


def uncounted_share(n: int, k: int, d: int, precision: str, implementation: str, platform: str) -> float:
    """The share of the 2 n k d flops of a search on this platform (cpu, gpu, tpu) that XLA's count leaves out.

    It counts nothing of a kernel, and the body of a loop once.
    """
    if implementation == "tree" and platform == "cpu":
        return 0.0  # it makes none of these products
    if implementation != "xla" and platform in ("tpu", "gpu"):
        return 1.0
    if implementation != "xla" and platform == "cpu" and _cpu_has_its_own(d, precision):
        return nearest_cpu.uncounted_share(n, k, d)
    return nearest_xla.uncounted_share(k)


def _cpu_has_its_own(d, precision):
    """Whether a CPU searches codes of d dimensions by a program of its own; the scan gives several candidates too."""
    return d <= nearest_cpu.MOST_DIMENSIONS and precision != "bf16_rescored"


def mean_code(codebook: Float[Array, "k d"], l2_normalize: bool = False) -> Float[Array, "d"]:
    """The mean of the codes as they are compared, float32."""
    if not l2_normalize:
        return codebook.astype(jnp.float32).mean(axis=0)
    # As a product of vector and matrix, so that no normalized copy of the codebook is made.
    return jnp.matmul(_inverse_norm(codebook), codebook.astype(jnp.float32), precision="highest") / codebook.shape[0]


def search(
    z: Float[Array, "n d"],
    codebook: Float[Array, "k d"],
    center: Float[Array, "d"],
    *,
    block_size: int | None = None,
    l2_normalize: bool = False,
    inner_product: bool = False,
    precision: str = "highest",
    implementation: str = "auto",
) -> tuple[Float[Array, "n"], Int[Array, "n"]]:
    """The smallest score of every latent and the index of its code; scores with the same `center` can be compared.

    A score is the squared distance minus |z - center|^2, which is the same for all codes; with `inner_product` it is
    z.center - z.e. For the arguments see `nearest_code`; unlike there, gradients are not stopped.
    """
    if block_size is not None and block_size < 1:
        raise ValueError(f"block_size must be at least 1, not {block_size}")
    for name, value, known in (("precision", precision, PASSES), ("implementation", implementation, IMPLEMENTATIONS)):
        if value not in known:
            raise ValueError(f"unknown {name} {value!r}: use one of {', '.join(known)}")
    if implementation == "tree" and inner_product:
        raise ValueError("a tree finds the nearest code, not the largest inner product: use auto or xla")
    if not len(z):
        return jnp.zeros(0), jnp.zeros(0, jnp.int32)
    rescored = precision == "bf16_rescored"
    options = {"normalize": l2_normalize, "precision": "bf16" if rescored else precision}
    count = RESCORED if rescored else 1
    classes = nearest_tpu.LANES if rescored else 1

    def best(program, **more):
        def lowest(query, codebook, center, bias):
            score, index = program.candidates(query, codebook, center, bias, **options, **more)
            score, index = _lowest(score, index, count)
            return _rescore(query, codebook, center, index, l2_normalize, inner_product) if rescored else (score, index)

        return lowest

    scan = best(nearest_xla, classes=classes, block_size=block_size)
    on_tpu, on_gpu = best(nearest_tpu), best(nearest_gpu, classes=classes)
    if implementation == "tree":
        on_cpu = functools.partial(nearest_tree.candidates, normalize=l2_normalize)
    elif _cpu_has_its_own(codebook.shape[1], precision):
        on_cpu = best(nearest_cpu, block_size=block_size)
    else:
        on_cpu = scan
    if inner_product:
        query, bias = -_compared(z, l2_normalize), jnp.zeros(len(codebook), jnp.float32)
    else:
        query = -2 * (_compared(z, l2_normalize) - center[None])
        length = _inverse_norm(codebook)[:, None] if l2_normalize else 1.0
        bias = jnp.sum(jnp.square(codebook.astype(jnp.float32) * length - center[None]), axis=1)
    arrays = query, codebook, center, bias
    if implementation == "xla":
        score, index = scan(*arrays)
    else:
        score, index = jax.lax.platform_dependent(*arrays, tpu=on_tpu, cuda=on_gpu, cpu=on_cpu, default=scan)
    return score[:, 0], index[:, 0]


def _compared(x, l2_normalize):
    x = x.astype(jnp.float32)
    return vectors.l2_normalize(x) if l2_normalize else x


def _inverse_norm(codebook):
    return jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(codebook.astype(jnp.float32)), axis=1), 1e-24))


def _lowest(score, index, count):
    """The `count` candidates with the smallest scores; if `count` is 1, the lowest index among equal scores."""
    if count == 1:
        low, most = score.min(axis=1, keepdims=True), jnp.iinfo(jnp.int32).max
        first = jnp.where(score == low, index, most).min(axis=1, keepdims=True)
        return low, jnp.where(first == most, index[:, :1], first)  # where scores are no numbers, a code all the same
    low, at = jax.lax.top_k(-score, min(count, score.shape[1]))
    return -low, jnp.take_along_axis(index, at, axis=1)


def _rescore(query, codebook, center, index, l2_normalize, inner_product):
    """The best of the candidates [n, c] by their float32 scores, one column of candidates at a time."""

    def exact(column):
        codes = _compared(codebook[column], l2_normalize) - center[None]
        return jnp.sum(codes * (query if inner_product else codes + query), axis=1)

    score = jax.lax.map(exact, index.T).T
    return _lowest(score, index, 1)
