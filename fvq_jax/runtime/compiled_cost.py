"""What a compiled program costs one device: memory, bytes sent, passes of matrix products, and the least time.

XLA's own counts (`memory_analysis`, `cost_analysis`) include neither the bytes sent nor the passes that a float32
product takes on a TPU: both are read from the program's text, the optimised HLO of `compiled.as_text()` for one
device. Compiling the training step is left to `training.step_plan`.
"""

import functools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from fvq_jax.runtime.chips import published_chip

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BETWEEN_SLICES = "between-slices"
# How many bfloat16 products a TPU computes for one float32 product at each precision.
_PASSES = {"high": 3, "highest": 6}
Amount = TypeVar("Amount", int, float)


class Instruction(NamedTuple):
    """One line of a program: `%name = shape opcode(operands), attributes`.

    Attributes:
      called: the computations it runs.
      text: all that follows the opcode.
    """

    shape: str
    opcode: str
    operands: tuple[str, ...]
    called: tuple[str, ...]
    text: str


class Program:
    """The computations of an optimised HLO text, and sums over what they execute.

    Attributes:
      computations: the instructions of every computation, in order, by its name.
      shapes: the shape of every instruction's result, as text.
    """

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.shapes: dict[str, str] = {}
        self._entry = ""
        for line in text.splitlines():
            if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{", line):
                # The text shows a TPU's fused reduce-scatter as an all-reduce that keeps only a slice of its result.
                scatters = header[2].startswith("all-reduce-scatter")
                current = self.computations[header[2]] = []
                self._entry = header[2] if header[1] else self._entry
            elif found := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)", line):
                name, shape, opcode, rest = found.groups()
                opcode = "reduce-scatter" if scatters and opcode == "all-reduce" else opcode
                operands = re.findall(r"%([\w.\-]+)", re.split(r"\)(?:, \w+=|$)", rest, maxsplit=1)[0])
                # The computation that an asynchronous operation runs is counted where the operation starts.
                called = () if opcode.endswith(("-done", "-update")) else tuple(_called(rest))
                current.append(Instruction(shape, opcode, tuple(operands), called, rest))
                self.shapes[name] = shape

    def total(self, amount: Callable[[Instruction], Amount]) -> Amount:
        """The sum of `amount` over all instructions that one run executes.

        The body of a loop counts once per iteration, or once where the program does not say how many there are. For
        a conditional, only the branch with the largest sum counts.
        """

        @functools.cache
        def of(computation):
            return sum(amount(i) + (called(i) if i.called else 0) for i in self.computations[computation])

        def called(instruction):
            amounts = [of(name) for name in instruction.called]
            if instruction.opcode == "conditional":
                return max(amounts)
            return sum(amounts) * (self._trips(instruction) if instruction.opcode == "while" else 1)

        return of(self._entry)

    def operand_bytes(self, instruction: Instruction) -> int:
        """Bytes of all operands together."""
        return sum(_bytes(self.shapes[name]) for name in instruction.operands)

    def _trips(self, loop: Instruction) -> int:
        """How often a while loop runs: as XLA noted it, or from a condition `counter < constant`, else 1."""
        if noted := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.text):
            return int(noted[1])
        condition = self.computations[_found(r"condition=%?([\w.\-]+)", loop.text)]
        limits = [re.match(r"(\d+)\)", i.text) for i in condition if i.opcode == "constant"]
        counted = any(i.opcode == "compare" and "direction=LT" in i.text for i in condition)
        return int(limits[0][1]) if counted and len(limits) == 1 and limits[0] else 1


def collective_bytes(program: Program, devices: int) -> dict[str, int]:
    """Bytes that each device sends in one run, by kind of collective.

    Counted for a ring of n devices that hold s bytes each: an all-gather sends (n - 1) s, a reduce-scatter or an
    all-to-all (n - 1) / n s, an all-reduce twice that, a permutation s. A collective that a TPU splits into a chain
    of fused steps, to overlap it with arithmetic, counts once. `between-slices`, present only if it is not 0, are the
    bytes handed to the hosts for the other slices of a TPU; they are not part of the other kinds.
    """
    factors = {
        "all-gather": lambda n: n - 1,
        "all-reduce": lambda n: 2 * (n - 1) / n,
        "reduce-scatter": lambda n: (n - 1) / n,
        "all-to-all": lambda n: (n - 1) / n,
        "collective-permute": lambda n: 1,
    }
    chains = set()

    def sent(kind, instruction):
        if instruction.opcode.removesuffix("-start") != kind:
            return 0
        if chain := re.search(r'chain_id="(\d+)"', instruction.text):
            if chain[1] in chains:
                return 0
            chains.add(chain[1])
        return program.operand_bytes(instruction) * factors[kind](_group_size(instruction.text, devices))

    def handed_over(instruction: Instruction) -> int:
        crosses = instruction.opcode == "send" and "_xla_megascale_target" in instruction.text
        return program.operand_bytes(instruction) if crosses else 0

    found = {kind: round(program.total(functools.partial(sent, kind))) for kind in COLLECTIVES}
    between = round(program.total(handed_over))
    return found | ({BETWEEN_SLICES: between} if between else {})


def repeated_pass_flops(program: Program) -> int:
    """Flops of a TPU beyond XLA's count: a float32 product at HIGHEST precision takes six bfloat16 passes, HIGH three.

    XLA counts every product once. Convolutions over padding are counted as if padding were pixels.
    """

    def extra(instruction: Instruction) -> int:
        precision = re.search(r"operand_precision=\{(\w+)", instruction.text)
        passes = _PASSES.get(precision[1], 1) if precision else 1
        if passes == 1 or not all(program.shapes[name].startswith("f32") for name in instruction.operands):
            return 0
        if instruction.opcode == "convolution":
            labels = _found(r"dim_labels=\w+_(\w+)->", instruction.text)
            sizes = _dimensions(program.shapes[instruction.operands[1]])
            summed = [size for size, label in zip(sizes, labels, strict=True) if label != "o"]
        elif instruction.opcode == "dot":
            axes = _found(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.text)
            sizes = _dimensions(program.shapes[instruction.operands[0]])
            summed = [sizes[int(axis)] for axis in axes.split(",") if axis]
        else:
            return 0
        return (passes - 1) * 2 * math.prod(_dimensions(instruction.shape)) * math.prod(summed)

    return program.total(extra)


def total_bytes(executable: jax.stages.Compiled) -> int:
    """Bytes that a program occupies while it runs: arguments, results in new buffers, temporaries, and its own code."""
    memory = executable.memory_analysis()
    if memory is None:
        raise NotImplementedError("this backend does not say how much memory a program takes")
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )


def bytes_per_device(tree: Any) -> int:
    """Bytes that the arrays of a tree take on one device, according to their layout."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize for leaf in leaves)


def least_time(
    device_kind: str, flops: float, memory_bytes: float, sent: dict[str, int]
) -> tuple[str | None, float | None]:
    """What takes longest ("compute", "memory" or "network") and its seconds; (None, None) without published figures.

    A roofline: each of the three runs at its peak, and the longest hides the other two. Real steps take longer. The
    least exact input is `memory_bytes`, XLA's count of bytes accessed: it does not know what a fusion keeps on the
    chip or reads twice, counts the body of a loop once, and misses what a kernel reads again.
    """
    chip = published_chip(device_kind)
    if chip is None or chip.memory_bandwidth is None or chip.network is None:
        return None, None
    between = sent.get(BETWEEN_SLICES, 0)
    network = (sum(sent.values()) - between) / chip.network
    if between:
        if chip.between_slices is None:
            return None, None
        network += between / chip.between_slices
    seconds = {"compute": flops / chip.bfloat16, "memory": memory_bytes / chip.memory_bandwidth, "network": network}
    bound = max(seconds, key=seconds.__getitem__)
    return bound, seconds[bound]


def out_of_memory(message: str) -> tuple[int, int] | None:
    """(needed, available) bytes that the TPU compiler's out-of-memory message names; None for any other message."""
    sizes = re.findall(r"([\d.]+)([KMGT])\b", message)
    # Only HBM counts: other memories are used by kernels, whose need does not depend on the batch.
    if "RESOURCE_EXHAUSTED" not in message or not re.search(r"\bhbm\b", message, re.IGNORECASE) or len(sizes) < 2:
        return None
    needed, available = (round(float(number) * 1024 ** (1 + "KMGT".index(unit))) for number, unit in sizes[:2])
    return needed, available


def _found(pattern: str, text: str) -> str:
    """The group of the pattern's first match in the text; ValueError if there is none, which is not expected."""
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"no {pattern} in {text!r}")
    return match[1]


def _called(text: str) -> Iterator[str]:
    """Names of the computations that an instruction with these attributes runs."""
    keys = "calls|to_apply|body|condition|branch_computations|(?:true|false)_computation|called_computations"
    for names in re.findall(rf"(?:{keys})=(\{{[^}}]*\}}|%?[\w.\-]+)", text):
        yield from re.findall(r"[\w.\-]+", names)


def _group_size(text: str, devices: int) -> int:
    """How many devices take part in one group of a collective; reads all three notations of groups."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return listed[1].count(",") + 1
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=", text):
        return int(iota[1])
    if axes := re.search(r"replica_groups=mesh\[(.*?)\].*? \{(.*?)\}", text):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", axes[1]))
        # Only a part of an axis may be used, written as 'axis':(before)size.
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", axes[2])
        return math.prod(int(size or sizes[name]) for name, size in parts)
    return devices


def _dimensions(shape: str) -> list[int]:
    """The dimensions of a shape: f32[8,256]{1,0} -> [8, 256]."""
    return [int(size) for size in _found(r"\[([\d,]*)\]", shape).split(",") if size]


def _bytes(shape: str) -> int:
    """Bytes of a shape, or of all parts of a tuple of shapes."""
    total = 0
    for dtype, sizes in re.findall(r"([a-z]\w*)\[([\d,]*)\]", shape):
        bits = 8 if dtype == "pred" else int((re.findall(r"\d+", dtype) or [0])[0])  # token[] has no number
        total += math.prod(int(size) for size in sizes.split(",") if size) * bits // 8
    return total
