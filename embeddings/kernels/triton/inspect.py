"""Compile every kernel without a GPU and tell what the compilers made of it: registers, spills, load and store widths.

python -m grzoo.embeddings.kernels.triton.inspect --targets sm_90 gfx942 --output kernels.csv
"""

import argparse
import csv
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import triton
from grzoo.embeddings.kernels.base import MAX_STEP
from triton.backends.compiler import GPUTarget

from . import function_kernels, index_kernels, row_kernels, update_kernels

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_TYPES = {  # of the arguments that are not pointers to int64
    "tables": "*i32", "leads": "*i32", "owners": "*i32", "out": "*fp32", "values": "*fp32", "grads": "*fp32",
    "corrections": "*fp32", "factors": "*fp32", "quantiles": "*fp32", "n": "i32", "capacity": "i32", "num_free": "i32",
    "used": "i32", "value": "fp32", "lr": "fp32", "eps": "fp32", "step": "fp32", "momentum": "fp32", "decay": "fp32",
    "weight_decay": "fp32", "weight1": "fp32", "weight2": "fp32", "beta2": "fp32", "log_beta1": "fp32",
    "log_beta1_rest": "fp32", "log_beta2": "fp32", "log_beta2_rest": "fp32",
}  # fmt: skip
# They move words that are no float32.
_MOVERS = {
    "gather_kernel": {"out": "*i32"},
    "scatter_kernel": {"values": "*i32"},
    "round_kernel": {"values": "*i32", "out": "*i16"},
}


class Variant(NamedTuple):
    """One compilation of a kernel."""

    kernel: Any
    constants: dict[str, int]
    warps: int
    width: int  # of a row, 0 where there is none


@dataclass(frozen=True)
class Report:
    """What came out for one variant on one target; -1 where it cannot be read."""

    kernel: str
    width: int
    target: str
    warps: int
    registers: int  # per thread (sm) or vector registers per lane (gfx)
    spills: int  # bytes of stack (sm) or spilled vector registers (gfx)
    shared_bytes: int
    load_bytes: int  # the widest load and store of one lane to global memory
    store_bytes: int
    triton: str


def variants(widths: Sequence[int] = (128, 64, 100)) -> Iterator[Variant]:
    """Yield the variants that are compiled: each kernel, and those of rows at each width."""
    warp = {"BLOCK": 64}
    for slots in (0, 1):
        yield Variant(index_kernels.find_kernel, {"SLOTS": slots, **warp}, 1, 0)
    for name in ("insert", "rehash", "leader", "repair"):
        yield Variant(getattr(index_kernels, f"{name}_kernel"), warp, 1, 0)
    for tables in (0, 1):
        yield Variant(function_kernels.claim_first_kernel, {"TABLES": tables, **warp}, 1, 0)
    yield Variant(function_kernels.rank_kernel, warp, 1, 0)
    for adam in (0, 1):
        constants = {"ADAM": adam, "GLOBAL": 0, "MAX": MAX_STEP, "SHIFT": 14, "ROWS": 128}
        yield Variant(update_kernels.count_kernel, constants, 4, 1)
    for width in widths:
        yield from _row_variants(width)


def _row_variants(width: int) -> Iterator[Variant]:
    padded = triton.next_power_of_2(width)
    shape = {"WIDTH": width, "PADDED": padded, "SHIFT": 14, "ROWS": max(1, 1024 // padded)}
    for name in ("gather", "scatter", "fill", "initialize", "gather_initial", "round"):
        kernel = getattr(row_kernels, f"{name}_kernel")
        yield Variant(kernel, {key: value for key, value in shape.items() if key in kernel.arg_names}, 4, width)
    yield Variant(update_kernels.sgd_kernel, {"MOMENTUM": 1, "DECAY": 1, **shape}, 4, width)
    yield Variant(update_kernels.adagrad_kernel, shape, 4, width)
    yield Variant(update_kernels.rowwise_adagrad_kernel, shape, 4, width)
    yield Variant(update_kernels.adam_kernel, {"DECAY": 2, **shape}, 4, width)
    reduction = {"WIDTH": width, "PADDED": padded, "START": 1, "MANY": max(2, min(32, 4096 // padded)), "FEW": 2}
    yield Variant(function_kernels.segment_sum_kernel, reduction, 1, width)


def compile_variant(variant: Variant, target: str) -> Any:
    """Return Triton's compiled kernel; nothing is loaded on a device."""
    names = variant.kernel.arg_names
    types = _TYPES | _MOVERS.get(variant.kernel.__name__, {})
    if variant.kernel is update_kernels.count_kernel and not variant.constants["ADAM"]:
        types = types | {"corrections": "*i64"}
    signature = {a: "constexpr" if a in variant.constants else types.get(a, "*i64") for a in names}
    aligned = [k for k, a in enumerate(names) if signature[a].startswith("*") or a == "capacity"]
    source = triton.compiler.ASTSource(
        fn=variant.kernel,
        signature=signature,
        constexprs=variant.constants,
        attrs={(k,): [["tt.divisibility", 16]] for k in aligned},
    )
    return triton.compile(source, target=TARGETS[target], options={"num_warps": variant.warps})


def inspect(variant: Variant, target: str) -> Report:
    """Compile one variant and read what can be read without a device."""
    return report(variant, target, compile_variant(variant, target))


def report(variant: Variant, target: str, compiled: Any) -> Report:
    """Read registers, spills and widths from a compiled kernel."""
    if target.startswith("sm"):
        loads, stores = (_ptx_width(compiled.asm["ptx"], op) for op in ("ld", "st"))
        registers, spills = _cubin_usage(compiled.asm["cubin"])
    else:
        text = compiled.asm["amdgcn"]
        loads, stores = (_gcn_width(text, op) for op in ("load", "store"))
        registers, spills = _gcn_number(text, "vgpr_count"), _gcn_number(text, "vgpr_spill_count")
    name = variant.kernel.__name__.removesuffix("_kernel")
    shared = compiled.metadata.shared
    return Report(
        name, variant.width, target, variant.warps, registers, spills, shared, loads, stores, triton.__version__
    )


def _ptx_width(ptx: str, operation: str) -> int:
    found = re.findall(rf"\b{operation}\.(?:\w+\.)*?global(?:\.[A-Za-z_]\w*(?:::\w+)*)*?(?:\.v(\d))?\.[bfus](\d+)", ptx)
    return max((int(count or 1) * int(bits) // 8 for count, bits in found), default=0)


def _gcn_width(text: str, operation: str) -> int:
    found = re.findall(rf"(?:global|buffer|flat)_{operation}_dword(?:x(\d))?", text)
    return max((4 * int(count or 1) for count in found), default=0)


def _gcn_number(text: str, name: str) -> int:
    found = re.search(rf"\.{name}:\s*(\d+)", text)
    return int(found.group(1)) if found else -1


def _cubin_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack, as the cuobjdump that comes with Triton tells them."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        return -1, -1
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    return (int(found.group(1)), int(found.group(2))) if found else (-1, -1)


def write_reports(reports: Iterable[Report], output: Path | None) -> None:
    """Write one CSV row per report to a file, or to standard output."""
    stream = output.open("w", newline="") if output else sys.stdout
    with stream:
        writer = csv.DictWriter(stream, [f.name for f in fields(Report)])
        writer.writeheader()
        writer.writerows(asdict(found) for found in reports)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write one CSV row per variant and target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--widths", nargs="+", type=int, default=[128, 64, 100], help="row widths to compile for")
    parser.add_argument("--output", type=Path, help="CSV file; default: standard output")
    options = parser.parse_args(arguments)
    found = (inspect(variant, target) for variant in variants(options.widths) for target in options.targets)
    write_reports(found, options.output)


if __name__ == "__main__":
    main()
