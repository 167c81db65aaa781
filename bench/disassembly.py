"""What the instructions of a compiled kernel say: the width of its loads and stores, its matrix instructions."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

TMA = "TMA"  # a copy by the memory engine, of as many bytes as its descriptor says
# "        /*01a0*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;"
_SASS = re.compile(r"^[ \t]*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*(?:\.\w+)*)", re.MULTILINE)
_SASS_ACCESS = {
    **{"LDG": "loads", "LDGSTS": "loads", "STG": "stores"},
    **{"UTMALDG": "loads", "UBLKCP": "loads", "UTMASTG": "stores", "UTMAREDG": "stores"},
}
_SASS_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
_AMD = re.compile(r"^[ \t]+([a-z]\w+)", re.MULTILINE)
_AMD_ACCESS = re.compile(r"(?:global|buffer|flat)_(load|store)_(?:lds_)?[us]?(byte|short|dword)(?:x(\d))?")
_AMD_BYTES = {"byte": 1, "short": 2, "dword": 4}


@dataclass(frozen=True)
class Instructions:
    """How many there are: of loads and stores of global memory by bytes a thread or TMA, of matrix ones by name."""

    loads: Counter[int | str] = field(default_factory=Counter)
    stores: Counter[int | str] = field(default_factory=Counter)
    matrix: Counter[str] = field(default_factory=Counter)


def read(assembly: str) -> Instructions:
    """Of one kernel, from what nvdisasm prints (SASS) or from AMD assembly."""
    found = Instructions()
    for opcode, *modifiers in (name.split(".") for name in _SASS.findall(assembly)):
        if access := _SASS_ACCESS.get(opcode):
            widths = [_SASS_BYTES[modifier] for modifier in modifiers if modifier in _SASS_BYTES]
            getattr(found, access)[TMA if opcode.startswith("U") else max(widths, default=4)] += 1
        elif opcode.endswith("MMA"):
            found.matrix[opcode] += 1
    for opcode in _AMD.findall(assembly):
        if accessed := _AMD_ACCESS.match(opcode):
            kind, unit, count = accessed.groups()
            getattr(found, f"{kind}s")[_AMD_BYTES[unit] * int(count or 1)] += 1
        elif opcode.startswith(("v_mfma", "v_smfma")):
            found.matrix[opcode] += 1
    return found


def kernels(disassembly: str) -> Iterator[tuple[str, str]]:
    """Each kernel's mangled name and code in what ``nvdisasm`` prints of a cubin that holds several."""
    _, *sections = re.split(r"^\s*\.section\s+\.text\.", disassembly, flags=re.MULTILINE)
    for section in sections:
        name, code = section.split(",", 1)
        yield name, code.split("\t.section", 1)[0]


def most_threads(disassembly: str) -> dict[str, int]:
    """By mangled name, the largest block each kernel was compiled for (``__launch_bounds__``), where it says one."""
    found = {}
    _, *sections = re.split(r"^\s*\.section\s+\.nv\.info\.", disassembly, flags=re.MULTILINE)
    for section in sections:
        name, body = section.split(",", 1)
        if "EIATTR_MAX_THREADS" in body:
            words = re.findall(r"\.word\s+(0x[0-9a-f]+)", body.split("EIATTR_MAX_THREADS", 1)[1])
            found[name] = int(words[0], 16) * int(words[1], 16) * int(words[2], 16)
    return found
