"""What a compiled kernel is: resources from ptxas, instructions and loops from cuobjdump."""

from __future__ import annotations

import re
from typing import NamedTuple


class Resources(NamedTuple):
    """What ``ptxas -v`` says of a kernel. Shared memory is the static part, all but `registers` are bytes."""

    registers: int
    shared: int
    stack: int
    spills: int


class Instruction(NamedTuple):
    """A line of SASS: `name` with its modifiers ("LDG.E.128"), `operands` as text."""

    address: int
    name: str
    operands: tuple[str, ...]

    def is_a(self, opcode: str) -> bool:
        """Whether its opcode, without modifiers, is `opcode`."""
        return self.name.partition(".")[0] == opcode

    def is_wide(self) -> bool:
        """Whether it moves 16 bytes for each thread."""
        return "128" in self.name.split(".")


# Device functions that are called have properties of their own; a kernel's begin at its entry.
_PROPERTIES = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '\w+'"
    r"|(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r"|Used (?P<registers>\d+) registers(?P<rest>.*)"
)


def parse_ptxas(text: str) -> dict[str, Resources]:
    """The resources of each kernel, by mangled name, from what ptxas printed for one architecture."""
    found: dict[str, Resources] = {}
    name, stack, spills = "", 0, 0
    for match in _PROPERTIES.finditer(text):
        if match["name"]:
            name, stack, spills = match["name"], 0, 0
        elif match["stack"]:
            stack, spills = stack + int(match["stack"]), spills + int(match["stores"]) + int(match["loads"])
        elif name:
            shared = re.search(r"(\d+) bytes smem", match["rest"])
            found[name] = Resources(int(match["registers"]), int(shared[1]) if shared else 0, stack, spills)
    return found


_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")


def parse_sass(text: str) -> dict[str, list[Instruction]]:
    """The instructions of each kernel, by mangled name, from what ``cuobjdump -sass`` printed."""
    kernels: dict[str, list[Instruction]] = {}
    body: list[Instruction] = []
    for line in text.splitlines():
        if "Function :" in line:
            body = kernels.setdefault(line.partition(":")[2].strip(), [])
        elif match := _INSTRUCTION.match(line):
            operands = tuple(part.strip() for part in match[3].split(",") if part.strip())
            body.append(Instruction(int(match[1], 16), match[2], operands))
    return kernels


def loops(body: list[Instruction]) -> list[list[Instruction]]:
    """The loops, shortest first: what lies between a branch backwards and its target.

    The endless branch to itself that ends every kernel is none.
    """
    spans = set()
    for instruction in body:
        target = re.search(r"0x([0-9a-f]+)$", instruction.operands[-1]) if instruction.operands else None
        if instruction.is_a("BRA") and target and int(target[1], 16) < instruction.address:
            spans.add((int(target[1], 16), instruction.address))
    ordered = sorted(spans, key=lambda span: span[1] - span[0])
    return [[item for item in body if first <= item.address <= last] for first, last in ordered]


def _register(operand: str) -> int | None:
    match = re.search(r"\bR(\d+)", operand)
    return int(match[1]) if match else None


def _reads(instruction: Instruction) -> set[int]:
    """The registers that an instruction reads; at least those of data of more than one register."""
    if instruction.is_a("HMMA"):
        sizes = (4, 2, 4)
        sources = zip(instruction.operands[1:], sizes)
    elif instruction.name.startswith(("ST", "RED", "ATOM")):
        sources = ((operand, 4 if instruction.is_wide() else 1) for operand in instruction.operands)
    else:
        sources = ((operand, 1) for operand in instruction.operands[1:])
    registers = ((_register(operand), size) for operand, size in sources)
    return {first + i for first, size in registers if first is not None for i in range(size)}


def prefetch_distances(loop: list[Instruction]) -> list[int]:
    """For each 16-byte global load of a loop, how many of the loop's HMMA run between it and the first use of its data.

    The loop is walked round from the load, since a compiler may rotate it. 0: the load waits where it is needed.
    """
    distances = []
    for at, load in enumerate(loop):
        if not (load.is_a("LDG") and load.is_wide()):
            continue
        first = _register(load.operands[0])
        data = {first + i for i in range(4)}
        passed = 0
        for instruction in loop[at + 1 :] + loop[:at]:
            if data & _reads(instruction):
                break
            passed += instruction.is_a("HMMA")
        distances.append(passed)
    return distances


def calls_routine(loop: list[Instruction]) -> bool:
    """Whether a loop calls a routine. A call of what follows it is how sm_80 leaves a loop in which lanes diverge."""
    following = loop[-1].address + 16
    return any(item.is_a("CALL") and int(item.operands[-1], 16) != following for item in loop)


def hot_loop(body: list[Instruction]) -> list[Instruction] | None:
    """The shortest loop with both 16-byte global loads and HMMA; None if there is none."""
    for loop in loops(body):
        if any(item.is_a("HMMA") for item in loop) and any(item.is_a("LDG") and item.is_wide() for item in loop):
            return loop
    return None
