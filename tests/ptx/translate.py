"""PTX, as nvcc and Triton emit it, to C++ that a CPU runs: each instruction becomes a call of machine.h.

A kernel becomes a function of one thread. Registers are its local variables, raw bits of 16, 32 or 64 each; labels stay
labels and branches become gotos; an instruction `mul.wide.s32 %rd1, %r1, 4` becomes `mul_wide_s32(rd1, r1, 4)`.
Whatever threads do together (barriers, shuffles, matrix products, asynchronous copies, clusters) goes to the host's
emulation of a block, csrc/cuda/host. An instruction that machine.h does not know ends the compilation with its name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

_TYPES = {
    "pred": "bool", "b8": "u8", "u8": "u8", "s8": "u8", "b16": "u16", "u16": "u16", "s16": "u16", "f16": "u16",
    "bf16": "u16", "b32": "u32", "u32": "u32", "s32": "u32", "f32": "u32", "b64": "u64", "u64": "u64", "s64": "u64",
    "f64": "u64",
}  # fmt: skip
_NARROW = {"u8": "u8", "b8": "u8", "s8": "s8", "s16": "s16", "s32": "s32", "s64": "s64"}  # what memory holds
# what only says how caches, the compiler or the order of memory are to be treated
_HINTS = re.compile(r"\.(nc|volatile|relaxed|weak|gpu|cta|sys|L1::\w+|L2::\w+|level::\w+)(?=\.|$)")
_PARAMETER = re.compile(r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)[^,]*?([\w$]+)(\[\d+\])?\s*(?:,|$)")
_NUMBER = re.compile(r"-?(0[xX][0-9a-fA-F]+|0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}|\d+)U?")


class Kernel(NamedTuple):
    """A `.entry`.

    name          as PTX has it
    function      of the C++ source, `void function(const void* const* parameters)`, called by each thread with the
                  place of each parameter
    parameters    their types: "u64", "f32", …, "b8[912]"
    """

    name: str
    function: str
    source: str
    parameters: list[str]


class _Scope:
    """Names of registers and labels between two braces; inline assembly opens scopes of its own."""

    def __init__(self, outer: _Scope | None, number: int):
        self.outer, self.suffix = outer, f"_{number}" if outer else ""
        self.registers: set[str] = set()
        self.ranges: set[str] = set()  # %r of %r<97>
        self.labels: set[str] = set()

    def register(self, name: str) -> str | None:
        stem = re.match(r"(.*?)(\d*)$", name)[1]
        if name in self.registers or (stem in self.ranges and name != stem):
            return re.sub(r"\W", "", name) + "_r" + self.suffix
        return self.outer.register(name) if self.outer else None

    def label(self, name: str) -> str:
        if self.outer is None or name in self.labels:
            return re.sub(r"\W", "_", name) + "_l" + self.suffix
        return self.outer.label(name)


def kernels(ptx: str) -> Iterator[Kernel]:
    """All `.entry` of a PTX file."""
    ptx = re.sub(r"//[^\n]*|/\*.*?\*/", "", ptx, flags=re.DOTALL)
    ptx = re.sub(r"^\s*\.(loc|file)\b[^\n]*", "", ptx, flags=re.MULTILINE)
    ptx = re.split(r"^\s*\.section\b", ptx, flags=re.MULTILINE)[0]
    heads = list(re.finditer(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{]*)\{", ptx))
    outside, at = "", 0
    bodies = []
    for head in heads:
        end = _closing(ptx, head.end())
        outside += ptx[at : head.start()]
        bodies.append(ptx[head.end() : end])
        at = end + 1
    for unknown in re.findall(r"\.func\b.*", outside + ptx[at:]):
        raise ValueError(f"expected kernels that call nothing, got a function: {unknown}")
    constants, shared = _module_variables(outside)
    for head, body in zip(heads, bodies, strict=True):
        parameters = re.findall(_PARAMETER, head[2].strip())
        function = _Function(head[1], [name for _, name, _ in parameters], constants, shared)
        types = [kind + size for kind, _, size in parameters]
        yield Kernel(head[1], function.c_name, function.translate(body), types)


def _closing(text: str, at: int) -> int:
    depth = 1
    for brace in re.finditer(r"[{}]", text[at:]):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return at + brace.start()
    raise ValueError("a brace that nothing closes")


def _module_variables(outside: str) -> tuple[dict[str, str], set[str]]:
    """(constants -> their C++ declaration, names of the dynamic shared memory)"""
    constants, shared = {}, set()
    for name, values in re.findall(r"\.(?:global|const)\s[^;]*?\.b8\s+([\w$]+)\[\d+\]\s*=\s*\{([^}]*)\}", outside):
        constants[name] = f"alignas(16) const u8 {_plain(name)}[] = {{{values}}};"
    for name in re.findall(r"\.extern\s+\.shared\s[^;]*?([\w$]+)\[\]", outside):
        shared.add(name)
    return constants, shared


def _plain(name: str) -> str:
    return re.sub(r"\W", "_", name)


class _Function:
    def __init__(self, name: str, parameters: list[str], constants: dict[str, str], shared: set[str]):
        self.name, self.c_name = name, f"{_plain(name)}_ptx"
        self.parameters = {p: i for i, p in enumerate(parameters)}
        self.constants, self.shared = constants, shared
        self.scope = _Scope(None, 0)
        self.n_scopes = 0
        self.declared: list[tuple[str, str]] = []  # register, type
        self.lines: list[str] = []

    def translate(self, body: str) -> str:
        statements = list(_statements(body))
        for i, statement in enumerate(statements):
            self._statement(statement)
            if statement == "{":
                self.scope.labels = _labels(statements[i + 1 :])
        used = "\n".join(self.lines)
        constants = [line for name, line in self.constants.items() if _plain(name) in used]
        words = set(re.findall(r"\w+", used))
        starts = {"bool": "false"}
        registers = "\n".join(
            f"    {kind} {name} = {starts.get(kind, f'{kind}(kUnset)')};"
            for name, kind in self.declared
            if name in words
        )
        return (
            "using namespace ptx;\nnamespace {\n" + "\n".join(constants) + "\n}\n"
            f'extern "C" void {self.c_name}(const void* const* parameters) {{\n'
            f"    (void)parameters;\n{registers}\n{used}\n}}\n"
        )

    def _statement(self, text: str) -> None:
        if text == "{":
            self.n_scopes += 1
            self.scope = _Scope(self.scope, self.n_scopes)
        elif text == "}":
            self.scope = self.scope.outer
        elif text.endswith(":"):
            self.lines.append(f"{self.scope.label(text[:-1])}:;")
        elif text.startswith(".reg"):
            self._registers(text)
        elif not text.startswith("."):
            self.lines.append("    " + self._instruction(text))
        elif not text.startswith(".pragma"):
            raise ValueError(f"{self.name}: a directive that is not known: {text}")

    def _registers(self, text: str) -> None:
        _, kind, names = text.split(None, 2)
        c_type = _TYPES[kind[1:]]
        for name in re.split(r"\s*,\s*", names):
            many = re.fullmatch(r"(.*)<(\d+)>", name)
            if many:
                self.scope.ranges.add(many[1])
                registers = [self.scope.register(f"{many[1]}{i}") for i in range(int(many[2]))]
            else:
                self.scope.registers.add(name)
                registers = [self.scope.register(name)]
            self.declared += [(register, c_type) for register in registers]

    def _instruction(self, text: str) -> str:
        guard = ""
        found = re.match(r"@(!?)([%\w]+)\s+(.*)", text, flags=re.DOTALL)
        if found:
            guard, text = f"if ({found[1]}{self.scope.register(found[2])}) ", found[3]
        mnemonic, _, rest = text.strip().partition(" ") if " " in text.strip() else (text.strip(), "", "")
        mnemonic, _, more = mnemonic.partition("\t")
        operands = _operands(f"{more} {rest}")
        return guard + self._call(mnemonic, operands)

    def _call(self, mnemonic: str, operands: list[str]) -> str:
        if mnemonic in ("ret", "exit"):
            return "return;"
        if mnemonic in ("bra", "bra.uni"):
            return f"goto {self.scope.label(operands[0])};"
        plain = _HINTS.sub("", mnemonic)
        found = re.fullmatch(r"(ld|st)\.(param|shared|global|const)(?:\.v([248]))?\.(\w+)", plain)
        found = found or re.fullmatch(r"(ld|st)()(?:\.v([248]))?\.(\w+)", plain)
        if found:
            return self._access(found[1], found[2] or "generic", found[4], operands)
        if mnemonic.startswith("wgmma.mma_async"):
            return self._wgmma(mnemonic, operands)
        if mnemonic.startswith("mov.b") and any("{" in operand for operand in operands):
            return self._packing(mnemonic, operands)
        name = re.sub(r"[.:]+", "_", mnemonic)
        return f"{name}({', '.join(self._flat(operands))});"

    def _access(self, word: str, space: str, kind: str, operands: list[str]) -> str:
        address, values = (operands[1], operands[0]) if word == "ld" else (operands[0], operands[1])
        c_type = _NARROW.get(kind, _TYPES[kind])
        arguments = [self._address(address), *self._flat([values])]
        return f"{'load' if word == 'ld' else 'store'}_{space}<{c_type}>({', '.join(arguments)});"

    def _wgmma(self, mnemonic: str, operands: list[str]) -> str:
        """d, a, b, whether d is added, signs of a and b, and for bf16 which of a and b that lie in shared memory are
        transposed."""
        found = re.search(r"m64n(\d+)k\d+\.f32\.(bf16\.bf16|tf32\.tf32)$", mnemonic)
        if not found or operands[4:6] != ["1", "1"]:
            raise ValueError(f"{self.name}: {mnemonic} of other types or with other operands than is known: {operands}")
        is_bf16, in_registers = found[2].startswith("bf16"), operands[1].startswith("{")
        d, a = self._flat([operands[0]]), self._flat([operands[1]])
        b, add, *transposed = self._flat([operands[2], operands[3], *operands[6:]])
        if not is_bf16:
            transposed = ["false"] * (1 if in_registers else 2)
        out = ", ".join(f"&{register}" for register in d)
        arguments = ", ".join([found[1], "d", *a, b, add, *transposed])
        return f"{{ u32* const d[] = {{{out}}}; wgmma<{16 if is_bf16 else 8}>({arguments}); }}"

    def _packing(self, mnemonic: str, operands: list[str]) -> str:
        if not operands[0].startswith("{"):
            return f"pack({', '.join(self._flat(operands))});"
        parts = _operands(operands[0][1:-1])
        bits = int(mnemonic.removeprefix("mov.b")) // len(parts)
        into = ["unread" if part == "_" else self._operand(part) for part in parts]
        return f"{{ u{bits} unread = 0; (void)unread; unpack({self._operand(operands[1])}, {', '.join(into)}); }}"

    def _flat(self, operands: list[str]) -> list[str]:
        flat = []
        for operand in operands:
            if operand.startswith("{"):
                flat += self._flat(_operands(operand[1:-1]))
            elif "|" in operand:
                flat += self._flat(operand.split("|"))
            else:
                flat.append(self._operand(operand))
        return flat

    def _operand(self, text: str) -> str:
        text = text.strip()
        if text.startswith("["):
            return self._address(text)
        if text.startswith("!"):
            return "!" + self._operand(text[1:])
        if text.startswith("-") and not _NUMBER.fullmatch(text):
            return "-" + self._operand(text[1:])
        if text == "_":
            return "u64(0)"
        register = self.scope.register(text)
        if register:
            return register
        if _NUMBER.fullmatch(text):
            return _number(text)
        if text.startswith("%"):
            return "special_" + _plain(text[1:]) + "()"
        return self._symbol(text)

    def _symbol(self, name: str) -> str:
        if name in self.parameters:
            return f"u64(parameters[{self.parameters[name]}])"
        if name in self.constants:
            return f"u64({_plain(name)})"
        if name in self.shared:
            return "kSharedStart"
        raise ValueError(f"{self.name}: neither a register nor anything else that is known: {name!r}")

    def _address(self, text: str) -> str:
        inside = text.strip()[1:-1].strip()
        base, plus, offset = inside.partition("+")
        if not plus:
            return f"u64({self._operand(base)})"
        return f"u64({self._operand(base)}) + u64(s64({offset.strip()}))"


def _number(text: str) -> str:
    sign, digits = ("-", text[1:]) if text.startswith("-") else ("", text)
    if digits[:2] in ("0f", "0F"):
        return f"{sign}0x{digits[2:]}u"
    if digits[:2] in ("0d", "0D"):
        return f"{sign}0x{digits[2:]}ull"
    digits = digits.rstrip("U")
    value = int(sign + digits, 0)
    return f"s64({value}ll)" if -(2**63) < value < 2**63 else f"s64({value & (2**64 - 1)}ull)"


def _statements(body: str) -> Iterator[str]:
    """Instructions, directives, `label:`, and the braces of scopes."""
    at, body = 0, body.rstrip()
    token = re.compile(r"\s*(?:([{}])|([\w$]+)\s*:(?!:)|((?:[^;{}]|\{[^{}]*\})+);|;)")
    while at < len(body):
        found = token.match(body, at)
        if not found:
            raise ValueError(f"not understood: {body[at : at + 100]!r}")
        at = found.end()
        if found[1]:
            yield found[1]
        elif found[2]:
            yield found[2] + ":"
        elif found[3]:
            yield " ".join(found[3].split())


def _labels(statements: list[str]) -> set[str]:
    """Of the scope that the statements begin in."""
    labels, depth = set(), 0
    for statement in statements:
        depth += {"{": 1, "}": -1}.get(statement, 0)
        if depth < 0:
            break
        if depth == 0 and statement.endswith(":"):
            labels.add(statement[:-1])
    return labels


def _operands(text: str) -> list[str]:
    """Split at the commas outside of braces and brackets."""
    return [part.strip() for part in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", text) if part.strip()]
