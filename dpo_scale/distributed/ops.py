"""What DeepSpeed compiles at run time: which of it a run needs, and whether this machine can."""

from __future__ import annotations

import contextlib
import io
import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ASYNC_IO = "async_io"


@dataclass(frozen=True, slots=True)
class CompiledOp:
    """An op that will be compiled, or was."""

    name: str
    purpose: str
    compatible: bool
    """Whether DeepSpeed's own probe finds what the op links with."""
    built: bool
    """Whether a compiled one lies in the extensions folder."""


def leave_out_unused_ops() -> None:
    """Keep DeepSpeed from compiling an all-reduce over shared memory when a process group starts on CPUs.

    Only its tensor-parallel inference calls it. Even a compiled one costs every start a run of ninja, and a lock file
    for which a start waits for ever after another was killed while it compiled.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__ = defaultdict(bool)  # False for every op; read by nothing else


def load_muon_uncompiled() -> None:
    """Let ZeRO-3 ask whether the optimizer is Muon, as it does at every start, without loading torch's compiler.

    That module compiles what it defines, which takes each rank a second and 40 MiB, and nothing here uses it.
    """
    from deepspeed.runtime import compiler

    compile_decorator = compiler.compile
    compiler.compile = lambda: compiler.dummy_decorator
    try:
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        compiler.compile = compile_decorator


def needed_ops(policy: Mapping[str, Any], reference_offload: str) -> dict[str, str]:
    """Op -> what for, under a policy's DeepSpeed configuration and the reference's offload.

    Nothing is compiled unless something goes to NVMe: the optimizer is PyTorch's.
    """
    zero = policy.get("zero_optimization", {})
    offloads = [zero.get(f"offload_{part}", {}).get("device") for part in ("param", "optimizer")]
    return {ASYNC_IO: "offload to NVMe"} if "nvme" in (*offloads, reference_offload) else {}


def extensions_folder() -> Path:
    """Where PyTorch keeps what it compiles at run time."""
    from torch.utils.cpp_extension import get_default_build_root

    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())


def probe_ops(needed: Mapping[str, str]) -> tuple[CompiledOp, ...]:
    """Ask DeepSpeed about some ops, without compiling them."""
    with contextlib.redirect_stdout(io.StringIO()):  # the probes print their opinions
        from deepspeed.ops.op_builder.all_ops import ALL_OPS
        from deepspeed.ops.op_builder.builder import probe_is_compatible

        compatible = {name: name in ALL_OPS and bool(probe_is_compatible(ALL_OPS[name])) for name in needed}
    root = extensions_folder()
    return tuple(
        CompiledOp(name, purpose, compatible[name], any(root.glob(f"**/{name}/{name}.so")))
        for name, purpose in needed.items()
    )
