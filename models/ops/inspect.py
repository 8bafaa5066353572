"""Compile every Triton kernel of the model ops without a GPU and tell registers, spills, load and store widths.

python -m grzoo.models.ops.inspect --targets sm_90 gfx942 --output kernels.csv
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from grzoo.embeddings.kernels.triton.inspect import TARGETS, Report, Variant, report, write_reports

from .hstu_attention import triton_kernels
from .hstu_attention.triton_launch import Launch, launch_of, padded
from .keyed_dropout import triton_kernels as dropout_kernels
from .keyed_dropout.triton import shape_of
from .norm_gate_dropout import triton_kernels as norm_gate_kernels
from .sampled_softmax import triton_kernels as softmax_kernels
from .sampled_softmax.triton import shape_of as softmax_shape_of

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# In the dtype of the products.
_TOKENS = ("query", "key", "value", "out", "grad", "dquery", "dkey", "dvalue", "x", "gate", "dx", "dgate")
_TYPES = {
    **dict.fromkeys(("position_table", "time_table", "position_sums", "time_sums"), "*fp32"),
    **dict.fromkeys(("query_times", "key_times", "thresholds"), "*i32"),
    **dict.fromkeys(("tile_sequence", "tile_block", "segment_tile", "segment_distance"), "*i32"),
    **dict.fromkeys(("scale", "divisor", "eps", "kept"), "fp32"),
    **dict.fromkeys(("starts", "row_keys"), "*i64"),
    "max_distance": "i64",
}
_SOFTMAX_TYPES = {
    **dict.fromkeys(("query", "rows", "losses", "normalisers", "slopes", "dquery", "drows"), "*fp32"),
    **dict.fromkeys(("index", "order", "offsets"), "*i64"),
    "accidental": "*u8",
    "inverse_temperature": "fp32",
}
NUM_BUCKETS = 129


def variants(dtype: str, width: int, target: str) -> Iterator[tuple[Variant, Launch]]:
    """Yield the kernels as a model with both biases of attention and heads of this width launches them."""
    launch = launch_of(width, width, _DTYPES[dtype], hopper=target == "sm_90")
    constants = {"WIDTH_K": width, "WIDTH_V": width, "PADDED_K": padded(width), "PADDED_V": padded(width)}
    constants |= {"TILE": launch.tile, "POSITION": 1, "TIMES": 0}
    constants |= {"BUCKETS": NUM_BUCKETS, "PADDED_BUCKETS": padded(NUM_BUCKETS)}
    by_times = constants | {"POSITION": 0, "TIMES": 2, "BUCKETS": 0}  # silu_attention
    names = ("forward", "query_gradient", "key_value_gradient")
    for name, chosen in [*((n, c) for c in (constants, by_times) for n in names), ("bias_gradient", constants)]:
        kernel = getattr(triton_kernels, f"{name}_kernel")
        used = {key: value for key, value in chosen.items() if key in kernel.arg_names}
        yield Variant(kernel, used, launch.warps, width), launch
    for name in ("forward", "backward"):
        kernel = getattr(norm_gate_kernels, f"norm_gate_{name}_kernel")
        yield Variant(kernel, {**shape_of(width), "DROPOUT": 1}, 4, width), Launch(1, 4, 3)
    yield Variant(dropout_kernels.keyed_dropout_kernel, shape_of(width), 4, width), Launch(1, 4, 3)
    for name in ("token_loss", "query_gradient", "row_gradient"):
        kernel = getattr(softmax_kernels, f"{name}_kernel")
        yield Variant(kernel, softmax_shape_of(width, 129), 4, width), Launch(1, 4, 3)


def compile_variant(variant: Variant, launch: Launch, dtype: str, target: str) -> Any:
    """Return Triton's compiled kernel; nothing is loaded on a device."""
    names = variant.kernel.arg_names
    constants: dict[str, int | str] = dict(variant.constants)
    if "PRECISION" in names:
        constants["PRECISION"] = "ieee" if target.startswith("gfx") else "tf32x3"
    types = _TYPES | dict.fromkeys(_TOKENS, f"*{dtype}")
    if "PICKS" in constants:
        types |= _SOFTMAX_TYPES
    if constants.get("TIMES"):
        types |= dict.fromkeys(("query_times", "key_times"), "*i64")
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    strides = [name for name in names if name.endswith(("_token", "_head", "_stride"))]
    aligned = [k for k, name in enumerate(names) if signature[name].startswith("*") or name in strides]
    source = triton.compiler.ASTSource(
        fn=variant.kernel,
        signature=signature,
        constexprs=constants,
        attrs={(k,): [["tt.divisibility", 16]] for k in aligned},
    )
    return triton.compile(source, target=TARGETS[target], options=launch.options)


def reports(dtypes: Sequence[str], widths: Sequence[int], targets: Sequence[str]) -> Iterator[Report]:
    """Compile and read all kernels for these products, widths of a head and targets."""
    for target in targets:
        for dtype in dtypes:
            for width in widths:
                for variant, launch in variants(dtype, width, target):
                    yield report(variant, target, compile_variant(variant, launch, dtype, target))


def main(arguments: Sequence[str] | None = None) -> None:
    """Write one CSV row per kernel, width and target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--dtypes", nargs="+", choices=_DTYPES, default=["bf16"], help="of the products")
    parser.add_argument("--widths", nargs="+", type=int, default=[64], help="widths of a head")
    parser.add_argument("--output", type=Path, help="CSV file; default: standard output")
    options = parser.parse_args(arguments)
    write_reports(reports(options.dtypes, options.widths, options.targets), options.output)


if __name__ == "__main__":
    main()
