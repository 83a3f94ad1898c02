"""AMD GPU assembly text, as LLVM writes it, into instructions, labels, directives and kernel metadata.

Triton keeps this text of every kernel it compiles (`compiled.asm["amdgcn"]`), so nothing here needs an LLVM tool.
Source: LLVM, "User Guide for AMDGPU Backend", sections "Assembler" and "Code Object Metadata".
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        mnemonic: As written, with the encoding suffix ("v_add_f32_e32"); `name` is without.
        operands: Texts such as "v[2:3]", "s7", "0x10"; modifiers split off.
        modifiers: "offset" -> "64", "op_sel" -> "[0,1]", and flags such as "offen" -> "1".
        target: Label a branch goes to.
        source: Where it came from, as "forward.py:91:39", as far as the text says.
        second: The other half of a VOPD pair ("::").
    """

    mnemonic: str
    operands: tuple[str, ...]
    modifiers: dict[str, str]
    target: str | None = None
    source: str = ""
    second: Instruction | None = None

    @property
    def name(self) -> str:
        """The mnemonic without encoding suffix and VOPD prefix: "v_add_f32"."""
        return base_name(self.mnemonic)

    def __str__(self) -> str:
        text = " ".join([self.mnemonic, ", ".join(self.operands), *(f"{k}:{v}" for k, v in self.modifiers.items())])
        text = f"{text.strip()} {self.target}" if self.target else text.strip()
        return f"{text} :: {self.second}" if self.second else text


@dataclass(frozen=True)
class Argument:
    """One kernel argument: its place in the argument buffer, and LLVM's value kind, such as "by_value"."""

    offset: int
    size: int
    kind: str


@dataclass
class Kernel:
    """One kernel of a module.

    Attributes:
        name: Its symbol.
        arch: "gfx942" and so on.
        instructions: In order of the text.
        labels: Label -> index of the instruction that follows.
        directives: ".amdhsa_" directives of the kernel descriptor, without the prefix.
        metadata: Numbers of its metadata entry: "vgpr_count", "vgpr_spill_count", "kernarg_segment_size" ...
        arguments: In order.
    """

    name: str
    arch: str
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    directives: dict[str, int] = field(default_factory=dict)
    metadata: dict[str, int] = field(default_factory=dict)
    arguments: list[Argument] = field(default_factory=list)

    @property
    def wave_size(self) -> int:
        """64 or 32."""
        return self.metadata.get("wavefront_size") or (64 if self.arch.startswith("gfx9") else 32)


_SUFFIX = re.compile(r"(_e64_dpp8|_e64_dpp|_dpp8|_dpp|_e32|_e64|_sdwa)$")
_MODIFIER = re.compile(r"\b([a-z_]\w*):(\[[^\]]*\]|swizzle\([^)]*\)|[^\s,]+)")
_FLAGS = frozenset(
    "offen idxen lds glc slc sc0 sc1 nt clamp dlc gds row_mirror row_half_mirror tfe scc".split()
)  # fmt: skip
_OPERAND = re.compile(r"\s*((?:\[[^\]]*\]|\([^)]*\)|[^,\[(])+)(?:,|$)")
_LABEL = re.compile(r"^([.\w$]+):")
_BRANCH = re.compile(r"(s_branch|s_cbranch_\w+)\s+([.\w$]+)$")


def base_name(mnemonic: str) -> str:
    """Strip encoding: "v_add_f32_e32" and "v_dual_add_f32" become "v_add_f32"."""
    name = _SUFFIX.sub("", mnemonic)
    return "v_" + name[7:] if name.startswith("v_dual_") else name


def instruction(text: str, source: str = "") -> Instruction:
    """Parse one instruction, without a comment.

    Raises:
        ValueError: `text` is empty.
    """
    if "::" in text:
        first, _, second = text.partition("::")
        x = instruction(first.strip(), source)
        return Instruction(x.mnemonic, x.operands, x.modifiers, None, source, instruction(second.strip(), source))
    branch = _BRANCH.match(text)
    if branch:
        return Instruction(branch[1], (), {}, branch[2], source)
    mnemonic, _, rest = text.partition(" ") if " " in text else text.partition("\t")
    if not mnemonic:
        raise ValueError("empty instruction text")
    modifiers: dict[str, str] = {}
    if ":" in rest:
        modifiers.update(_MODIFIER.findall(rest))
        rest = _MODIFIER.sub("", rest)
    operands = [match.strip() for match in _OPERAND.findall(rest) if match.strip()]
    if operands:
        words = operands[-1].split()
        # Flags follow the last operand without a comma; "scc" alone is the operand of that name.
        while words and words[-1] in _FLAGS and not (words == ["scc"] and mnemonic.startswith("s_")):
            modifiers[words.pop()] = "1"
        operands[-1] = " ".join(words)
        if not operands[-1]:
            operands.pop()
    return Instruction(mnemonic, tuple(operands), modifiers, None, source)


def parse(text: str) -> dict[str, Kernel]:
    """All kernels of a module, by name.

    Raises:
        ValueError: The text names no AMD GPU, or describes no kernel.
    """
    target = re.search(r'\.amdgcn_target\s+"amdgcn-amd-amdhsa-\w*-(gfx\w+)', text)
    if not target:
        raise ValueError('this is not AMD GPU assembly: it has no ".amdgcn_target" directive')
    names = re.findall(r"^\s*\.amdhsa_kernel\s+(\S+)", text, re.MULTILINE)
    if not names:
        raise ValueError('the assembly describes no kernel: it has no ".amdhsa_kernel" directive')
    kernels = {name: Kernel(name, target[1]) for name in names}
    _parse_code(text, kernels)
    for match in re.finditer(
        r"^\s*\.amdhsa_kernel\s+(\S+)(.*?)^\s*\.end_amdhsa_kernel", text, re.MULTILINE | re.DOTALL
    ):
        found = re.findall(r"^\s+\.amdhsa_(\w+)\s+(\d+)\s*$", match[2], re.MULTILINE)
        kernels[match[1]].directives.update((name, int(value)) for name, value in found)
    metadata = re.search(r"^\s*\.amdgpu_metadata\n(.*?)^\s*\.end_amdgpu_metadata", text, re.MULTILINE | re.DOTALL)
    if metadata:
        parse_metadata(metadata[1], kernels)
    return kernels


def parse_only(text: str) -> Kernel:
    """The one kernel of a module, such as a Triton kernel's.

    Raises:
        ValueError: There are several, or as `parse`.
    """
    kernels = parse(text)
    if len(kernels) != 1:
        raise ValueError(f"expected one kernel in the assembly, found {sorted(kernels)}")
    return next(iter(kernels.values()))


def _parse_code(text: str, kernels: dict[str, Kernel]) -> None:
    current: Kernel | None = None
    source = ""
    for line in text.split("\n"):
        comment = line.find(";")
        code = (line if comment < 0 else line[:comment]).strip()
        if not code:
            continue
        label = _LABEL.match(code)
        if label:
            if label[1] in kernels:
                current = kernels[label[1]]
            elif label[1].startswith(".Lfunc_end"):
                current = None
            if current is not None:
                current.labels[label[1]] = len(current.instructions)
        elif code.startswith("."):
            if code.startswith(".loc") and comment >= 0:
                source = line[comment + 1 :].strip()
        elif current is not None:
            current.instructions.append(instruction(code, source))


def parse_metadata(text: str, kernels: dict[str, Kernel]) -> None:
    """Fill in metadata from a note's YAML, as far as it is numbers and arguments; kernels are items indented by two."""
    for entry in re.split(r"^  - ", text, flags=re.MULTILINE)[1:]:
        name = re.search(r"^ {4}\.name:\s+(\S+)", entry, re.MULTILINE)
        if not name or name[1] not in kernels:
            continue
        kernel = kernels[name[1]]
        found = re.findall(r"^(?: {4})?\.(\w+):\s+(\d+)\s*$", entry, re.MULTILINE)
        kernel.metadata.update((key, int(value)) for key, value in found)
        for item in re.split(r"^ {6}- ", entry, flags=re.MULTILINE)[1:]:
            fields = dict(re.findall(r"^(?: {8})?\.(\w+):\s+(\S+)", item, re.MULTILINE))
            if "offset" in fields:
                kernel.arguments.append(Argument(int(fields["offset"]), int(fields["size"]), fields["value_kind"]))
