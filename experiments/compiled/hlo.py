"""Reads of a compiled program what its memory and cost analyses do not say.

XLA prints a program as computations, lists of operations one a line. A fusion is one operation,
whose computation stands elsewhere; what stands in the loop's body or in the entry itself is a
kernel each.
"""

import collections
import math
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

# They name, group or wait for arrays that something else has made.
_FREE = (
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id",
    "replica-id", "opt-barrier", "add-dependency",
)  # fmt: skip
_CALLS = ("call", "conditional", "while", "async-start")
_COLLECTIVES = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"
)  # fmt: skip
# They read of their first operand only what they return.
_PARTIAL = ("gather", "dynamic-slice", "slice")

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_OPERATION = re.compile(r"\s+(?:ROOT )?%([\w.\-]+) = (.*?) ([a-z][a-z\-]*)\(([^()]*)\)(.*)$")
_CALLED = re.compile(r"(?:calls|to_apply|body|branch_computations)=\{?(%[\w.\-]+(?:, %[\w.\-]+)*)")


class Operation(NamedTuple):
    """One line of a computation: `%name = shape opcode(operands), attributes`."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str

    @property
    def called(self) -> list[str]:
        """The computations that this operation runs."""
        return re.findall(r"%([\w.\-]+)", " ".join(_CALLED.findall(self.attributes)))

    @property
    def bytes_made(self) -> int:
        """Bytes of the result; the start of a copy or slice also names its source."""
        sizes = _sizes(self.shape)  # (result, source, _) or ((source), result, _)
        return min(sizes[:2]) if self.opcode in ("copy-start", "slice-start") else sum(sizes)

    @property
    def is_kernel(self) -> bool:
        """Whether it runs something; an asynchronous operation counts where it starts."""
        free = self.opcode in _FREE or '"ConcatBitcast"' in self.attributes
        return not free and not self.opcode.endswith(("-done", "-update"))


class Program:
    """The kernels of one pass through a program's largest loop, or of all where there is none.

    Attributes:
        kernels: their number by kind; "other" is mostly scalars.
        collectives: the number of exchanges between devices, by name.
        bytes_moved: read and written by all kernels on a device, as arrays without padding.
        estimated_cycles: the compiler's own estimate; None where it prints none.
        outside: the kernels of a call outside the loop, the one with the largest result first.
    """

    def __init__(self, text: str):
        """Reads the text of `jax.stages.Compiled.as_text()`."""
        self._computations, entry = _parse(text)
        self._made = {op.name: op for ops in self._computations.values() for op in ops}
        body, outside = list(self._flat(self._computations[entry], through=("call",))), []
        loops = {op: op.called[0] for op in body if op.opcode == "while"}
        if loops:
            loop = max(loops, key=lambda op: len(self._computations[loops[op]]))
            outside = [op for op in body if op is not loop and op.is_kernel]
            body = list(self._flat(self._computations[loops[loop]]))
        kernels = [op for op in body if op.is_kernel]
        kinds = collections.Counter(map(self._kind, kernels))
        self.kernels = dict(kinds.most_common())
        self.collectives = {name: kinds[name] for name in _COLLECTIVES if kinds[name]}
        self.bytes_moved = sum(op.bytes_made for op in kernels) + sum(
            self._bytes_read(op, i) for op in kernels for i in range(len(op.operands))
        )
        cycles = re.findall(r'"estimated_cycles":"(\d+)"', " ".join(k.attributes for k in kernels))
        self.estimated_cycles = sum(map(int, cycles)) if cycles else None
        self.outside = sorted(outside, key=lambda op: -op.bytes_made)

    def _flat(
        self, operations: Iterable[Operation], through: Iterable[str] = _CALLS
    ) -> Iterator[Operation]:
        """The operations, with calls replaced by what they call."""
        for op in operations:
            if op.opcode in through and op.called:
                for name in op.called:
                    yield from self._flat(self._computations[name], through)
            else:
                yield op

    def _kind(self, kernel: Operation) -> str:
        inner = list(self._flat([kernel], through=("fusion",)))
        windows = [re.search(r"window=\{[^}]", op.attributes) for op in inner
                   if op.opcode == "convolution"]  # fmt: skip
        if any(windows) or "$conv" in kernel.attributes:
            return "convolution"
        if windows or "__cublas$" in kernel.attributes or any(op.opcode == "dot" for op in inner):
            return "matrix product"
        opcode = kernel.opcode.removesuffix("-start")
        return opcode if opcode in ("fusion", "copy", *_COLLECTIVES) else "other"

    def _bytes_read(self, kernel: Operation, index: int) -> int:
        """Bytes of an operand that are read: of one that is only sliced, the slices."""
        operand = self._made.get(kernel.operands[index])
        whole = sum(_sizes(operand.shape)) if operand else 0
        inside, names = [kernel], {kernel.operands[index]}
        if kernel.opcode == "fusion":
            inside = self._computations[kernel.called[0]]
            same = (str(index),)
            names = {op.name for op in inside if op.opcode == "parameter" and op.operands == same}
            for op in inside:  # a bitcast is the same array
                if op.opcode == "bitcast" and op.operands[0] in names:
                    names.add(op.name)
        users = [op for op in inside if op.opcode != "bitcast" and names & {*op.operands}]
        partial = [
            op
            for op in users
            if op.opcode.removesuffix("-start") in _PARTIAL and op.operands[0] in names
        ]
        only_sliced = users and len(partial) == len(users)
        return min(whole, sum(op.bytes_made for op in partial)) if only_sliced else whole


def _parse(text: str) -> tuple[dict[str, list[Operation]], str]:
    """Operations by computation, and the name of the entry."""
    computations: dict[str, list[Operation]] = {}
    entry = current = ""
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            current = header[2]
            computations[current] = []
            entry = current if header[1] else entry
        elif current and (match := _OPERATION.match(line)):
            name, shape, opcode, operands, attributes = match.groups()
            found = [operands] if opcode == "parameter" else re.findall(r"%([\w.\-]+)", operands)
            operation = Operation(name, shape, opcode, tuple(found), attributes)
            computations[current].append(operation)
    return computations, entry


def _sizes(shape: str) -> list[int]:
    """Bytes of an array, or of each array of a tuple."""
    bits = {"pred": 8, "token": 0, "opaque": 0}
    return [
        math.prod(int(n) for n in dims.split(",") if n) * bits.get(kind, int(width or 8)) // 8
        for kind, width, dims in re.findall(r"([a-z]+(\d*)\w*)\[([\d,]*)\]", shape)
    ]
