"""Reads a compiled program: its kernels, what they move and compute, and what its loop repeats.

XLA prints a program as computations, lists of operations one a line. A fusion is one operation,
whose computation stands elsewhere; what stands in the loop's body or in the entry itself is a
kernel each.
"""

import collections
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

_BITS = {"pred": 8, "token": 0, "opaque": 0, "bf16": 16} | {
    f"{kind}{bits}": bits for kind in "suf" for bits in (2, 4, 8, 16, 32, 64)
}
# They name, group or wait for arrays that something else has made.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id",
    "replica-id", "opt-barrier", "add-dependency",
}  # fmt: skip
_CALLS = ("call", "conditional", "while", "async-start")
_COLLECTIVES = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"
)  # fmt: skip
# They read of their first operand only what they return.
_PARTIAL = ("gather", "dynamic-slice", "slice")

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_OPERATION = re.compile(r"\s+(?:ROOT )?%([\w.\-]+) = (.*?) ([a-z][a-z\-]*)\((.*)$")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|branch_computations)=\{?(%[\w.\-]+(?:, %[\w.\-]+)*)")


class Operation(NamedTuple):
    """One line of a computation: `%name = shape opcode(operands), attributes`."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str

    @property
    def called(self) -> list[str]:
        """The computations that this operation runs."""
        return [name.lstrip("%") for m in _CALLED.findall(self.rest) for name in m.split(", ")]


class Cost(NamedTuple):
    """What a list of kernels costs, on one device.

    Attributes:
        kernels: their number by kind.
        collectives: the number of exchanges between devices, by name.
        bytes_moved: read and written by all kernels, as arrays without padding.
        flops: of convolutions and matrix products, a multiplication and an addition being two.
        estimated_cycles: the compiler's own estimate; None where it prints none.
    """

    kernels: dict[str, int]
    collectives: dict[str, int]
    bytes_moved: int
    flops: int
    estimated_cycles: int | None


class Program:
    """A compiled program, from its text.

    Attributes:
        body: the operations that are repeated: of the largest loop, or all where there is none.
        outside: the operations of the entry, without the loop; empty where there is none.
    """

    def __init__(self, text: str):
        """Parse the text of `jax.stages.Compiled.as_text()`."""
        self._computations, entry = _parse(text)
        operations = list(self._flat(self._computations[entry], through=("call",)))
        self.body, self.outside = operations, list[Operation]()
        loops = {
            op: self._computations[_find(r"body=%([\w.\-]+)", op.rest)]
            for op in operations
            if op.opcode == "while"
        }
        if loops:
            loop = max(loops, key=lambda op: len(loops[op]))
            self.body = list(self._flat(loops[loop]))
            self.outside = [op for op in operations if op is not loop]
        self._shapes = {op.name: op.shape for ops in self._computations.values() for op in ops}

    def cost(self) -> Cost:
        """The cost of one pass through the body."""
        kernels = [op for op in self.body if is_kernel(op)]
        collectives = collections.Counter(
            name for op in kernels for name in _COLLECTIVES if op.opcode.startswith(name)
        )
        cycles = [_find(r'"estimated_cycles":"(\d+)"', op.rest) for op in kernels]
        return Cost(
            kernels=dict(collections.Counter(map(self._kind, kernels)).most_common()),
            collectives=dict(collectives),
            bytes_moved=sum(self._bytes_moved(op) for op in kernels),
            flops=sum(map(self._flops, kernels)),
            estimated_cycles=sum(map(int, filter(None, cycles))) if any(cycles) else None,
        )

    def outside_loop(self, at_least: int) -> list[tuple[str, str, int]]:
        """Name, shape and bytes of each result outside the loop of so many bytes, largest first."""
        made = (
            (op.name, _without_layout(op.shape), _result_bytes(op))
            for op in self.outside
            if is_kernel(op)
        )
        return sorted((one for one in made if one[2] >= at_least), key=lambda one: -one[2])

    def _flat(
        self, operations: Iterable[Operation], through: Sequence[str] = _CALLS
    ) -> Iterator[Operation]:
        """The operations, with calls replaced by what they call."""
        for op in operations:
            if op.opcode in through and op.called:
                for name in op.called:
                    yield from self._flat(self._computations[name], through)
            else:
                yield op

    def _inner(self, op: Operation) -> Iterator[Operation]:
        """The operation itself, and all that its fusion computes."""
        yield op
        if op.opcode == "fusion":
            for name in op.called:
                for inner in self._computations[name]:
                    yield from self._inner(inner)

    def _kind(self, op: Operation) -> str:
        """The kind of a kernel; "other" is mostly scalars, and what has no kind of its own."""
        inner = list(self._inner(op))
        if any(i.opcode == "convolution" and _window(i) for i in inner) or "$conv" in op.rest:
            return "convolution"
        if any(i.opcode in ("dot", "convolution") for i in inner) or "__cublas$" in op.rest:
            return "matrix product"
        opcode = op.opcode.removesuffix("-start")
        return opcode if opcode in ("fusion", "copy", *_COLLECTIVES) else "other"

    def _bytes_moved(self, op: Operation) -> int:
        return _result_bytes(op) + sum(
            self._bytes_read(op, i, name) for i, name in enumerate(op.operands)
        )

    def _bytes_read(self, op: Operation, index: int, name: str) -> int:
        """Bytes of an operand that are read: of one that is only sliced, the slices."""
        whole = _bytes(self._shapes.get(name, ""))
        if op.opcode.removesuffix("-start") in _PARTIAL and index == 0:
            return min(whole, _result_bytes(op))
        if op.opcode != "fusion":
            return whole
        inside = self._computations[op.called[0]]
        names = {i.name for i in inside if i.opcode == "parameter" and i.operands == (str(index),)}
        for i in inside:  # a bitcast is the same array
            if i.opcode == "bitcast" and i.operands[0] in names:
                names.add(i.name)
        users = [i for i in inside if i.opcode != "bitcast" and names & set(i.operands)]
        partial = [i for i in users if i.opcode in _PARTIAL and i.operands[0] in names]
        if users and len(partial) == len(users):
            return min(whole, sum(_bytes(i.shape) for i in partial))
        return whole

    def _flops(self, op: Operation) -> int:
        if "$conv" in op.rest:
            return self._cudnn_flops(op)
        if "__cublas$" in op.rest:  # m·k, k·n and m·n values: the root of their product is m·k·n
            arrays = [*(self._shapes[name] for name in op.operands[:2]), op.shape]
            return 2 * math.isqrt(math.prod(map(_size, arrays)))
        return sum(self._product_flops(i) for i in self._inner(op))

    def _product_flops(self, op: Operation) -> int:
        """FLOPs of a `dot` or `convolution`; zeros that a dilation puts in do not count."""
        out = 2 * _size(op.shape)
        if op.opcode == "dot":
            left = _dims(self._shapes[op.operands[0]])
            axes = _find(r"lhs_contracting_dims=\{([\d,]+)\}", op.rest)
            return out * math.prod(left[int(axis)] for axis in axes.split(",")) if axes else 0
        if op.opcode == "convolution":
            kernel = self._shapes[op.operands[1]]
            labels = _find(r"dim_labels=\w+_(\w+)->", op.rest)
            zeros = _find(r"lhs_dilate=([\dx]+)", _window(op)) or "1"
            features = _dims(kernel)[labels.index("o")] if labels else 1
            return out * _size(kernel) // features // math.prod(map(int, zeros.split("x")))
        return 0

    def _cudnn_flops(self, op: Operation) -> int:
        """FLOPs of cuDNN's convolution: 2 · |kernel| · |pixels of the small image|."""
        first, second = (self._shapes[name] for name in op.operands[:2])
        small, kernel = op.shape, second
        if "BackwardInput" in op.rest:
            small = first
        elif "BackwardFilter" in op.rest:
            small, kernel = second, op.shape
        labels = _find(r"dim_labels=\w+->(\w+)", op.rest)
        features = _dims(small)[labels.index("f")] if labels else 1
        return 2 * _size(kernel) * _size(small) // features


def is_kernel(op: Operation) -> bool:
    """Whether the operation runs something; an asynchronous one counts where it starts."""
    if op.opcode in _FREE or '"ConcatBitcast"' in op.rest:
        return False
    return not op.opcode.endswith(("-done", "-update"))


def _parse(text: str) -> tuple[Mapping[str, list[Operation]], str]:
    """Operations by computation, and the name of the entry."""
    computations: dict[str, list[Operation]] = {}
    entry = current = ""
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            current = header[2]
            computations[current] = []
            entry = current if header[1] else entry
        elif current and (match := _OPERATION.match(line)):
            name, shape, opcode, rest = match.groups()
            arguments = rest[: _closing(rest)]
            operands = re.findall(r"%([\w.\-]+)", arguments)
            if opcode == "parameter":
                operands = [arguments]
            computations[current].append(Operation(name, shape, opcode, tuple(operands), rest))
    return computations, entry


def _closing(text: str) -> int:
    """Index of the parenthesis that closes one opened before the text."""
    depths = itertools.accumulate(((x == "(") - (x == ")") for x in text), initial=1)
    return next((i - 1 for i, depth in enumerate(depths) if depth == 0), len(text))


def _find(pattern: str, text: str) -> str:
    """The first group of a pattern, or nothing."""
    match = re.search(pattern, text)
    return match[1] if match else ""


def _window(op: Operation) -> str:
    return _find(r"window=\{([^}]*)\}", op.rest)


def _dims(shape: str) -> list[int]:
    return [int(n) for n in _find(r"\w+\[([\d,]*)\]", shape).split(",") if n]


def _size(shape: str) -> int:
    return math.prod(_dims(shape))


def _bytes(shape: str) -> int:
    """Bytes of an array, or of all arrays of a tuple."""
    return sum(_size(m[0]) * _BITS.get(m[1], 8) // 8 for m in _SHAPE.finditer(shape))


def _result_bytes(op: Operation) -> int:
    """Bytes that an operation makes; a copy's or slice's start also names its source."""
    if op.opcode in ("copy-start", "slice-start"):  # (result, source, _) or ((source), result, _)
        return min(_bytes(match[0]) for match in itertools.islice(_SHAPE.finditer(op.shape), 2))
    return _bytes(op.shape)


def _without_layout(shape: str) -> str:
    return re.sub(r"\{[^}]*\}|/\*.*?\*/", "", shape)
