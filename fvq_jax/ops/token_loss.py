"""Cross entropy of codes under a linear head, streamed over the vocabulary, on one device or on a mesh.

The logits of all tokens for all codes would be the largest array of a generator by far: 2 TiB for 524,288 tokens and
1,048,576 codes in float32. They are computed one block of tokens and codes at a time. The gradient has a closed form,
for which they are computed once more, unless those of a device are few enough to be kept (`keeps_logits`).

On a mesh no device ever holds the whole head either. The rows of its codes are divided over `codebook`. Every device
sends its tokens around a ring along that axis; each stop adds what its own rows say about them, and after a full turn
they are back. The columns of the head may be stored in parts along `data`: a block of rows is put together when it is
used, in the dtype of the products, and its gradient is summed over `data` in float32 and divided again.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from fvq_jax.ops.sharded_codebook import TOKENS
from fvq_jax.ops.split_matmul import multiply_parts

HEAD = P("codebook", "data")  # how the rows and columns of the head are divided
LOGITS = P(None, "codebook", "data")  # and those that are kept, of every stop of the ring for codes and tokens
BUDGET = 64 * 2**20  # bytes for what the blocks of one device need
KEPT = 256 * 2**20  # bytes of logits that a device keeps for the gradient; if there are more, it keeps none

_Blocks = tuple[int, int]


def token_nll(
    hidden: Float[Array, "b t d"],
    output: Float[Array, "v d"],
    codes: Int[Array, "b t"],
    *,
    mesh: Mesh | None = None,
    dtype: DTypeLike = jnp.float32,
    blocks: tuple[int, int] | None = None,
    keep: bool | None = None,
) -> tuple[Float[Array, "b t"], Bool[Array, "b t"]]:
    """The negative log likelihood of every code under the logits `hidden @ output.T`, and whether it is the likeliest.

    Gradients reach `hidden` and `output`, in closed form. Logits are sums in float32 of products in `dtype`; their
    maximum, exponentials and logarithm are float32. For the gradient, softmax minus one-hot is rounded to `dtype`, and
    its products are summed in float32, over tokens, codes and devices.

    Beside copies of `hidden` in `dtype` and of its gradient in float32, temporaries stay below `BUDGET` on each device,
    and what is kept for the gradient below `KEPT`. A TPU's compiler adds copies of what the device holds of the head in
    `dtype`, and of its gradient, where it likes.

    Args:
      hidden: the states that predict the codes; on a mesh, divided by images over all devices.
      output: a row for every code; on a mesh with axes `data` and `codebook`, laid out as `HEAD`.
      codes: from 0 to v - 1; any other number makes the likelihood NaN.
      mesh: sizes must divide: b by the number of devices, v by `codebook`, d by `data`.
      dtype: of the products: float32 (at the highest precision) or bfloat16.
      blocks: how many tokens and codes are looked at together; the default follows from `BUDGET`. Any positive numbers.
      keep: whether all logits are kept for the gradient; the default is `keeps_logits`.

    Returns:
      float32 in nats, and a boolean: no code has a larger logit, and none of a lower number an equal one.

    Raises:
      ValueError: sizes that the mesh does not divide, or blocks that are not positive.
    """
    dtype = jnp.dtype(dtype)
    blocks = block_sizes(output.shape[1], dtype) if blocks is None else blocks
    if min(blocks) < 1:
        raise ValueError(f"blocks must be at least 1, not {blocks}")
    if mesh is not None:
        data, codebook = mesh.shape["data"], mesh.shape["codebook"]
        for what, size, parts in (
            ("images", len(hidden), data * codebook),
            ("codes", len(output), codebook),
            ("columns of the head", output.shape[1], data),
        ):
            if size % parts:
                raise ValueError(f"{size} {what} cannot be divided evenly over {parts} devices; use a multiple of that")
    if keep is None:
        keep = keeps_logits(codes.size // (1 if mesh is None else mesh.size), len(output))
    return _token_nll(hidden, output, codes, mesh, dtype, blocks, keep)


def block_sizes(width: int, dtype: DTypeLike) -> tuple[int, int]:
    """How many tokens and codes of this width are looked at together, so that temporaries stay within `BUDGET`.

    As many tokens as codes, a multiple of 128: that needs the fewest reads of memory for a product.
    """
    narrow = jnp.dtype(dtype).itemsize
    square = 8 + narrow  # logits and probabilities of a token and a code, and their gradient in `dtype`
    side = width * (2 * narrow + 24)  # of a token and a code: the states, and both gradients with what is added to them
    size = 128
    while square * (size + 128) ** 2 + side * (size + 128) <= BUDGET:
        size += 128
    return size, size


def keeps_logits(tokens: int, vocab: int) -> bool:
    """Whether a device with so many tokens keeps its logits for the gradient, which saves one product of four."""
    return 4 * tokens * vocab <= KEPT


def block_size(length: int, most: int) -> int:
    """How large the blocks of an axis of this length are: as few as `most` allows, and equally large.

    Large ones are multiples of 128, as a matrix unit wants them.
    """
    equal = -(-length // -(-length // most))
    rounded = -(-equal // 128) * 128
    return min(rounded, length) if rounded <= most else equal


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def _token_nll(hidden, output, codes, mesh, dtype, blocks, _):
    return _forward(hidden, output, codes, mesh, dtype, blocks, keep=False)[0]


def _forward(hidden, output, codes, mesh, dtype, blocks, keep):
    def forward(hidden, rows, codes):
        shape, hidden, codes = codes.shape, _flat(hidden), codes.reshape(-1)
        first = _first_row(rows, mesh)

        def look(stop, tokens, carry):
            """Adds what the rows of this device say about these tokens."""
            states, codes = tokens

            def block_of_codes(at, fresh_codes, carry):
                weights = _whole_rows(rows, at, dtype, mesh)
                numbers = first + at.numbers
                rows_at = at

                def block_of_tokens(at, fresh, carry):
                    seen, kept = carry
                    logits = multiply_parts(weights, at.of(states))
                    if keep:
                        kept = jax.lax.dynamic_update_slice(kept, logits[None], (stop, rows_at.start, at.start))
                    logits = jnp.where(fresh_codes[:, None], logits, -jnp.inf)
                    own = (numbers[:, None] == at.of(codes)[None]) & fresh_codes[:, None]
                    before = jax.tree.map(at.of, seen)
                    after = _seen(before, logits, numbers, own)
                    after = jax.tree.map(lambda new, old: jnp.where(fresh, new, old), after, before)
                    return jax.tree.map(at.put, seen, after), kept

                return _each_block(len(states), blocks[0], block_of_tokens, carry)

            return _each_block(len(rows), blocks[1], block_of_codes, carry)

        n = len(codes)
        nothing = {
            "top": jnp.full(n, -jnp.inf, jnp.float32),
            "total": jnp.zeros(n, jnp.float32),
            "best": jnp.zeros(n, jnp.int32),
            "own": jnp.full(n, jnp.nan, jnp.float32),
        }
        stops = 1 if mesh is None else mesh.shape["codebook"]
        kept = jnp.zeros((stops, len(rows), n), jnp.float32) if keep else None
        seen, kept = _around(mesh, look, (hidden, codes), (nothing, kept), travels=(True, False))
        log_sum = seen["top"] + jnp.log(seen["total"])
        return *(x.reshape(shape) for x in (log_sum - seen["own"], seen["best"] == codes, log_sum)), kept

    states = hidden.astype(dtype)
    run = _on(mesh, forward, (TOKENS, HEAD, TOKENS), (TOKENS, TOKENS, TOKENS, LOGITS))
    nll, hit, log_sum, kept = run(states, output, codes)
    return (nll, hit), (states, output, codes, log_sum, kept)


def _backward(mesh, dtype, blocks, _, residuals, cotangents):
    def backward(hidden, rows, codes, log_sum, kept, slope):
        shape, hidden = hidden.shape, _flat(hidden)
        first = _first_row(rows, mesh)

        def look(stop, tokens, gradients):
            states, codes, log_sum, slope = tokens

            def block_of_codes(at, fresh_codes, gradients):
                to_states, to_rows = gradients
                weights = _whole_rows(rows, at, dtype, mesh)
                numbers = first + at.numbers
                rows_at = at

                def block_of_tokens(at, fresh, gradients):
                    to_states, to_weights = gradients
                    x = at.of(states)
                    if kept is None:
                        logits = multiply_parts(weights, x)
                    else:
                        place, shape = (stop, rows_at.start, at.start), (1, len(weights), len(x))
                        logits = jax.lax.dynamic_slice(kept, place, shape)[0]
                    likely = jnp.exp(logits - at.of(log_sum)[None])
                    own = numbers[:, None] == at.of(codes)[None]
                    to_logits = (likely - own) * at.of(slope)[None]
                    to_logits = jnp.where(fresh_codes[:, None] & fresh[None], to_logits, 0).astype(dtype)
                    to_states = at.put(to_states, at.of(to_states) + multiply_parts(to_logits.T, weights.T))
                    return to_states, to_weights + multiply_parts(to_logits, x.T)

                zero = jnp.zeros(weights.shape, jnp.float32)
                to_states, to_weights = _each_block(len(states), blocks[0], block_of_tokens, (to_states, zero))
                return to_states, rows_at.put(to_rows, rows_at.of(to_rows) + _own_columns(to_weights, mesh))

            return _each_block(len(rows), blocks[1], block_of_codes, gradients)

        # The gradient of the states goes around with them, that of the rows stays where they are.
        zero = jnp.zeros(hidden.shape, jnp.float32), jnp.zeros(rows.shape, jnp.float32)
        tokens = hidden, codes.reshape(-1), log_sum.reshape(-1), slope.reshape(-1)
        to_states, to_rows = _around(mesh, look, tokens, zero, travels=(True, False))
        return to_states.reshape(shape), to_rows

    run = _on(mesh, backward, (TOKENS, HEAD, TOKENS, TOKENS, LOGITS, TOKENS), (TOKENS, HEAD))
    to_hidden, to_output = run(*residuals, cotangents[0])
    return to_hidden, to_output.astype(residuals[1].dtype), None


_token_nll.defvjp(_forward, _backward)


def _seen(before, logits, numbers, own):
    """What is known after these codes: the largest logit and its code, the sum of exp(logit - top), the own logit."""
    top = logits.max(axis=0)
    # In floating point, since a CPU has a fast program for its minima only; the count of a block is exact in it.
    count = jnp.arange(len(numbers), dtype=jnp.float32)
    place = jnp.where(logits == top[None], count[:, None], len(numbers) - 1).min(axis=0)
    best = numbers[place.astype(jnp.int32)]
    # Around the ring, the rows of lower numbers may come later.
    better = (top > before["top"]) | ((top == before["top"]) & (best < before["best"]))
    highest = jnp.maximum(top, before["top"])
    return {
        "top": highest,
        "total": before["total"] * jnp.exp(before["top"] - highest) + jnp.exp(logits - highest[None]).sum(axis=0),
        "best": jnp.where(better, best, before["best"]),
        "own": jnp.where(own.any(axis=0), jnp.sum(jnp.where(own, logits, 0), axis=0), before["own"]),
    }


class _Block:
    """A part of an array's first axis."""

    def __init__(self, start: Any, size: int):
        self.start, self._size = start, size
        self.numbers = (start + jnp.arange(size)).astype(jnp.int32)

    def of(self, x):
        return jax.lax.dynamic_slice_in_dim(x, self.start, self._size)

    def put(self, x, part):
        return jax.lax.dynamic_update_slice_in_dim(x, part, self.start, axis=0)


def _each_block(length: int, size: int, body: Callable[..., Any], carry: Any) -> Any:
    """Calls carry = body(block, fresh, carry) for all blocks of an axis of that length, of at most that size.

    Nothing is padded: the last block ends where the axis ends, and may begin with entries that were seen before;
    `fresh` says of every entry whether it is new.
    """
    size = block_size(length, size)

    def step(i, carry):
        start = jnp.minimum(i * size, length - size)
        block = _Block(start, size)
        return body(block, block.numbers >= i * size, carry)

    return jax.lax.fori_loop(0, -(-length // size), step, carry)


def _around(mesh: Mesh | None, look: Callable[..., Any], tokens: Any, carry: Any, travels: Any = True) -> Any:
    """carry = look(stop, tokens, carry) at every device of the ring along `codebook`; stops are counted from 0.

    `travels` says which parts of carry go around with the tokens; the others stay on their device.
    """
    devices = 1 if mesh is None else mesh.shape["codebook"]
    if devices == 1:
        return look(0, tokens, carry)
    ring = [(i, (i + 1) % devices) for i in range(devices)]

    def send(x):
        return jax.lax.ppermute(x, "codebook", ring)

    def stop(number, both):
        tokens, carry = both
        following = jax.tree.map(send, tokens)  # needs no result, so it can be sent meanwhile
        carry = look(number, tokens, carry)
        carry = jax.tree.map(lambda go, part: jax.tree.map(send, part) if go else part, travels, carry)
        return following, carry

    return jax.lax.fori_loop(0, devices, stop, (tokens, carry))[1]


# A collective along the columns themselves would make XLA keep a transposed copy of all rows.
def _whole_rows(rows, block, dtype, mesh):
    # The barrier keeps XLA from casting all rows before the loop, which would make a copy of them.
    part = jax.lax.optimization_barrier(block.of(rows)).astype(dtype)
    if mesh is None or mesh.shape["data"] == 1:
        return part
    return jnp.moveaxis(jax.lax.all_gather(part, "data"), 0, 1).reshape(len(part), -1)


def _own_columns(rows, mesh):
    if mesh is None or mesh.shape["data"] == 1:
        return rows
    parts = jnp.moveaxis(rows.reshape(len(rows), mesh.shape["data"], -1), 1, 0)
    return jax.lax.psum_scatter(parts, "data")


def _first_row(rows, mesh):
    return 0 if mesh is None else jax.lax.axis_index("codebook") * len(rows)


def _flat(x):
    return x.reshape(-1, x.shape[-1])


def _on(mesh, function, in_specs, out_specs):
    if mesh is None:
        return function
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
