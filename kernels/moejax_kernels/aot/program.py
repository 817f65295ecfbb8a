"""An optimized HLO program as computations and instructions, and how often each of them runs.

The compiler's own totals count the body of a loop once, which hides all layers of a scanned model
but one. Here a loop's trips are read from its condition (or from what the backend notes), and every
instruction weighs as often as it runs.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from functools import cached_property

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*)?->.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"^([\w\-]+)\(")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"(?:calls|called_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(
    r"(?:branch_computations=\{([^}]*)\}|true_computation=%?([\w.\-]+), "
    r"false_computation=%?([\w.\-]+))"
)
_APPLIED = re.compile(r"to_apply=%?([\w.\-]+)")
_BODY = re.compile(r"body=%?([\w.\-]+)")
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_INDEX = re.compile(r"index=(\d+)")
_SCOPE = re.compile(r'op_name="([^"]*)"')
_CONSTANT = re.compile(r"constant\((-?\d+)\)")
_ARRAY = re.compile(r"\b(pred|token|bf16|[sufc]\d+(?:e\d\w*)?)\[([\d,]*)\](?:\{([^}]*)\})?")


@dataclasses.dataclass(frozen=True)
class Array:
    """An array in a shape. space: the memory it lies in, 0 for HBM."""

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Bytes, subbyte elements packed."""
        bits = {"pred": 8, "token": 0}.get(self.dtype)
        bits = int(re.findall(r"\d+", self.dtype)[0]) if bits is None else bits
        return -(-self.size * bits // 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation. shape: as written; rest: attributes behind the operands."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str
    root: bool

    @cached_property
    def arrays(self) -> tuple[Array, ...]:
        """The arrays of the result, of a tuple all of them."""
        return arrays(self.shape)

    @property
    def scope(self) -> str:
        """The path of names under which JAX traced it, "" where the compiler made it."""
        found = _SCOPE.search(self.rest)
        return found[1] if found else ""


@dataclasses.dataclass(frozen=True)
class Program:
    """computations: name -> instructions in order. entry: the name of the first.

    unknown_loops: loops whose trips the text does not tell; each counts as one trip.
    """

    computations: Mapping[str, tuple[Instruction, ...]]
    entry: str

    @cached_property
    def _tables(self) -> dict[str, dict[str, Instruction]]:
        return {name: {one.name: one for one in body} for name, body in self.computations.items()}

    def find(self, computation: str, name: str) -> Instruction | None:
        """The instruction of that name in a computation."""
        return self._tables.get(computation, {}).get(name)

    def operands(self, computation: str, one: Instruction) -> tuple[Instruction, ...]:
        """What an instruction reads, as far as it is in the same computation."""
        found = (self.find(computation, name) for name in one.operands)
        return tuple(operand for operand in found if operand is not None)

    @cached_property
    def _walk(self) -> tuple[dict[str, float], dict[str, float], tuple[str, ...]]:
        """(runs on its own, runs inside a fusion or async op, loops of unknown trips)."""
        plain: dict[str, float] = {}
        inner: dict[str, float] = {}
        unknown: list[str] = []

        def visit(name: str, times: float, into: dict[str, float]) -> None:
            if name not in self.computations:
                return
            into[name] = into.get(name, 0.0) + times
            for one in self.computations[name]:
                if one.opcode == "while":
                    trips = self._trips(name, one)
                    if trips is None:
                        unknown.append(one.name)
                    if body := _BODY.search(one.rest):
                        visit(body[1], times * (1 if trips is None else trips), into)
                elif one.opcode == "conditional":
                    for branch in _branches(one.rest):  # what runs longest is not known: all do
                        visit(branch, times, into)
                elif one.opcode == "fusion" or one.opcode.startswith("async"):
                    if one.opcode in ("async-update", "async-done"):
                        continue  # the start names the same computation
                    for called in _CALLED.findall(one.rest):
                        visit(called, times, inner)
                elif one.opcode == "call" and (called := _APPLIED.search(one.rest)):
                    visit(called[1], times, into)

        visit(self.entry, 1.0, plain)
        return plain, inner, tuple(unknown)

    @property
    def runs(self) -> dict[str, float]:
        """Computation -> how often it runs, loops and calls counted; without fused ones."""
        return self._walk[0]

    @property
    def fused_runs(self) -> dict[str, float]:
        """The same of computations inside fusions and asynchronous ops."""
        return self._walk[1]

    @property
    def unknown_loops(self) -> tuple[str, ...]:
        """Loops that count as one trip because the text does not tell how many they make."""
        return self._walk[2]

    def each(self) -> Iterator[tuple[str, Instruction, float, bool]]:
        """(computation, instruction, times, inside a fusion) of everything that runs."""
        for table, fused in ((self.runs, False), (self.fused_runs, True)):
            for name, times in table.items():
                for one in self.computations[name]:
                    yield name, one, times, fused

    def _trips(self, computation: str, loop: Instruction) -> int | None:
        if noted := _TRIPS.search(loop.rest):
            return int(noted[1])
        condition, body = _CONDITION.search(loop.rest), _BODY.search(loop.rest)
        if condition is None or body is None:
            return None
        first = self._initial(computation, loop)
        compare = next((i for i in self.computations[condition[1]] if i.root), None)
        if compare is not None and compare.opcode == "fusion":
            return self._fused_trips(condition[1], compare, first, body[1])
        if compare is None or compare.opcode != "compare" or "direction=LT" not in compare.rest:
            return None
        left, right = (self.find(condition[1], name) for name in compare.operands)
        return self._count(left, right, condition[1], first, body[1])

    def _fused_trips(self, condition, fusion, first, body) -> int | None:
        called = _CALLED.search(fusion.rest)
        if called is None:
            return None
        inner = self.computations.get(called[1], ())
        compare = next((i for i in inner if i.root), None)
        if compare is None or compare.opcode != "compare" or "direction=LT" not in compare.rest:
            return None

        def outside(name: str) -> Instruction | None:
            one = self.find(called[1], name)
            if one is not None and one.opcode == "parameter":
                return self.find(condition, fusion.operands[int(one.operands[0])])
            return one

        left, right = (outside(name) for name in compare.operands)
        return self._count(left, right, condition, first, body)

    def _count(self, left, right, condition, first, body) -> int | None:
        if left is None or right is None or left.opcode != "get-tuple-element":
            return None
        index = _index(left)
        stop, start = self._value(condition, right, first), first.get(index)
        step = self._step(body, index, first)
        if stop is None or start is None or not step:
            return None
        return max(0, -(-(stop - start) // step))

    def _initial(self, computation: str, loop: Instruction) -> dict[int, int]:
        """Constant elements of the tuple a loop begins with."""
        made = self.find(computation, loop.operands[0])
        if made is None or made.opcode != "tuple":
            return {}
        found = {}
        for index, name in enumerate(made.operands):
            one = self.find(computation, name)
            value = self._value(computation, one, {}) if one is not None else None
            if value is not None:
                found[index] = value
        return found

    def _step(self, body: str, index: int, first: dict[int, int]) -> int | None:
        root = next((i for i in self.computations[body] if i.root), None)
        if root is None or root.opcode != "tuple" or index >= len(root.operands):
            return None
        one = self.find(body, root.operands[index])
        while one is not None and one.opcode in ("copy", "bitcast"):
            one = self.find(body, one.operands[0])
        if one is None or one.opcode != "add":
            return 1  # what JAX's scans do; the sum may hide in a fusion
        values = [self._value(body, o, first) for o in self.operands(body, one)]
        known = [value for value in values if value is not None]
        return known[-1] if known else 1

    def _value(
        self, computation: str, one: Instruction | None, first: dict[int, int]
    ) -> int | None:
        while one is not None and one.opcode in ("copy", "bitcast"):
            one = self.find(computation, one.operands[0])
        if one is None:
            return None
        if one.opcode == "constant":
            found = _CONSTANT.search(f"constant({one.operands[0]})") if one.operands else None
            return int(found[1]) if found else None
        if one.opcode == "get-tuple-element":
            source = self.find(computation, one.operands[0])
            if source is not None and source.opcode == "parameter":
                return first.get(_index(one))
        return None


def parse_program(text: str) -> Program:
    """The program of an HLO text, as `HloModule.to_string` or a dump writes it."""
    computations: dict[str, tuple[Instruction, ...]] = {}
    entry, name, body = "", "", []
    for line in text.splitlines():
        if name:
            if line.startswith("}"):
                computations[name] = tuple(body)
                name, body = "", []
            elif one := _instruction(line):
                body.append(one)
        elif header := _HEADER.match(line):
            name = header[2]
            entry = name if header[1] else entry
    return Program(computations, entry)


def arrays(shape: str) -> tuple[Array, ...]:
    """The arrays that a shape names, in order."""
    found = []
    for dtype, dims, layout in _ARRAY.findall(shape):
        space = re.search(r"S\((\d+)\)", layout)
        sizes = tuple(int(size) for size in dims.split(",") if size)
        found.append(Array(dtype, sizes, int(space[1]) if space else 0))
    return tuple(found)


def _instruction(line: str) -> Instruction | None:
    found = _INSTRUCTION.match(line)
    if found is None:
        return None
    text = re.sub(r"/\*.*?\*/", "", found[2])
    shape, text = _shape(text)
    opcode = _OPCODE.match(text)
    if opcode is None:
        return None
    stop = _closing(text, opcode.end() - 1)
    inside = text[opcode.end() : stop]
    names = tuple(_NAME.findall(inside)) or tuple(filter(None, [inside.strip()]))
    root = line.lstrip().startswith("ROOT ")
    return Instruction(found[1], shape, opcode[1], names, text[stop + 1 :], root)


def _shape(text: str) -> tuple[str, str]:
    """(shape, what follows it)."""
    stop = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    return text[:stop], text[stop:].lstrip()


def _closing(text: str, start: int) -> int:
    depth = 0
    for index in range(start, len(text)):
        if text[index] == "(":
            depth += 1
        elif text[index] == ")":
            depth -= 1
            if not depth:
                return index
    return len(text)


def _index(element: Instruction) -> int:
    """Which element of a tuple a get-tuple-element takes."""
    found = _INDEX.search(element.rest)
    return int(found[1]) if found else 0


def _branches(rest: str) -> list[str]:
    found = _BRANCHES.search(rest)
    if found is None:
        return []
    if found[1] is not None:
        return [name.strip().lstrip("%") for name in found[1].split(",")]
    return [found[2], found[3]]
