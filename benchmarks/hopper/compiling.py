"""Compiling a Triton kernel for Hopper on a machine without a GPU, and reading what it takes.

Triton brings its own assembler, and `cuobjdump` beside it says how many registers, how much stack
(spilled registers live there) and how much shared memory the machine code uses.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HOPPER = ("cuda", 90, 32)
"""Backend, compute capability and threads of a warp."""

SHARED_BYTES = 227 * 1024
"""Shared memory that one block of threads may take on Hopper."""

_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_TENSOR_CORES = re.compile(r"\b(?:wgmma\.mma_async|mma\.sync)\b")


@dataclass(frozen=True)
class Case:
    """One specialisation of a kernel.

    `signature` maps arguments to Triton types ("*bf16", "i32", "fp32"), `constants` the constexpr
    arguments to their values. `tensor_cores` says that it must multiply on them. `aligned` names
    pointers and integers that are multiples of 16, as Triton finds out at a launch.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 2
    tensor_cores: bool = False
    aligned: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class Resources:
    """What a block of threads takes. `stack` and `local` are bytes a thread: spills, if any."""

    name: str
    registers: int
    stack: int
    local: int
    shared: int
    tensor_core_instructions: int

    def problems(self, case: Case) -> list[str]:
        """Why this would be slow or would not start."""
        found = []
        if self.stack or self.local:
            found.append(f"{self.name} spills {self.stack + self.local} bytes a thread")
        if self.shared > SHARED_BYTES:
            found.append(f"{self.name} takes {self.shared} bytes of shared memory")
        if case.tensor_cores and not self.tensor_core_instructions:
            found.append(f"{self.name} multiplies without tensor cores")
        return found


def compile_case(case: Case) -> Resources:
    """Machine code for Hopper, and its resources.

    Raises:
        RuntimeError: Triton interprets (TRITON_INTERPRET is set), so there is nothing to compile.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    if not isinstance(case.kernel, JITFunction):
        raise RuntimeError("kernels are interpreted here; unset TRITON_INTERPRET to compile them")
    names = case.kernel.arg_names
    signature = {
        name: "constexpr" if name in case.constants else case.signature[name] for name in names
    }
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in case.aligned}
    source = ASTSource(case.kernel, signature, constexprs=dict(case.constants), attrs=attributes)
    made: Any = triton.compile(
        source,
        target=GPUTarget(*HOPPER),
        options={"num_warps": case.warps, "num_stages": case.stages},
    )
    registers, stack, static, local = _usage(made.asm["cubin"])
    return Resources(
        name=case.name,
        registers=registers,
        stack=stack,
        local=local,
        shared=max(int(made.metadata.shared), static),
        tensor_core_instructions=len(_TENSOR_CORES.findall(made.asm["ptx"])),
    )


def _usage(cubin: bytes) -> tuple[int, ...]:
    """(registers, stack, static shared, local) as the bundled cuobjdump reads them."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory(prefix="plait-hopper-") as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        said = subprocess.run(
            [str(tool), "--dump-resource-usage", str(file)],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
    found = _RESOURCES.search(said)
    if found is None:
        raise RuntimeError(f"cuobjdump names no resources:\n{said}")
    return tuple(int(group) for group in found.groups())
