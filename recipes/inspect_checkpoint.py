"""Shows what is in a checkpoint-N or an exported folder and verifies it; with two folders, what differs.

    python -m grzoo.recipes.inspect_checkpoint outputs/demo/checkpoint-180
    python -m grzoo.recipes.inspect_checkpoint outputs/demo/checkpoint-120 outputs/demo/checkpoint-180 --json

Exit status: 0 when the folder is complete (and equal to the other one), 1 when it is damaged or they differ, 2 when it
is no such folder. Checksums are computed anew; no pickle is ever opened.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grzoo.recipes.inspecting import compare, inspect


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a checkpoint-N or an exported folder")
    parser.add_argument("other", type=Path, nargs="?", help="a folder to compare it with")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(argv)
    folders = [arguments.folder] + [arguments.other] * (arguments.other is not None)
    try:
        reports = [inspect(folder, lambda name: print(f"verifying {name}", file=sys.stderr)) for folder in folders]
        intact = all(report["complete"] for report in reports)
        difference = compare(*folders) if len(folders) == 2 and intact else None
    except (ValueError, KeyError, TypeError, OSError) as error:
        print(error if isinstance(error, ValueError) else f"{arguments.folder}: {error!r}", file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps({"folders": reports, "difference": difference}, indent=1))
    else:
        print("\n\n".join(map(text, reports)) + (f"\n\n{difference_text(difference)}" if difference else ""))
    return 0 if intact and (difference is None or difference["equal"]) else 1


def text(report: dict[str, Any]) -> str:
    """A report for people."""
    lines = [f"{report['folder']}: {report['kind']}, {_size(report['bytes'])}, seed {report['seed']}"]
    if "step" in report:
        lines.append(f"  step {report['step']}, written by {report['written_by']}")
    if report["optimizer"]:
        lines.append(f"  optimizer of the tables {report['optimizer']['name']}, slots {report['optimizer']['slots']}")
    for name, table in report["tables"].items():
        lines.append(f"  table {name}: {table['rows']:,} rows x {table['embedding_dim']}, {_size(table['bytes'])}")
        lines += [f"    {column:<16} {' '.join(map(str, kind))}" for column, kind in sorted(table["columns"].items())]
    parameters = [name for name in report["dense"] if not name.startswith("optimizer.")]
    lines.append(f"  dense: {len(parameters)} tensors, {len(report['dense']) - len(parameters)} of optimizer state")
    is_checkpoint = report["kind"] == "checkpoint"
    checked = "checksums match" if is_checkpoint else "checksums of the tables match, the other files parse"
    if not report["has_checksums"]:
        checked = "there are no checksums, the files parse"
    lines += [f"  DAMAGED: {problem}" for problem in report["problems"]] or [f"  complete: {checked}"]
    return "\n".join(lines)


def difference_text(difference: dict[str, Any]) -> str:
    """A difference for people."""
    if difference["equal"]:
        return "equal: ids, rows, state that both have, clock, numbers of waiting, pinned and logged ids, dense tensors"
    lines = [f"  table {name} only in the first" for name in difference["tables_only_in_first"]]
    lines += [f"  table {name} only in the second" for name in difference["tables_only_in_second"]]
    for name, table in difference["tables"].items():
        lines.append(
            f"  table {name}: {table['only_in_first']:,} ids only in the first, {table['only_in_second']:,} only in "
            f"the second, {table['rows_changed']:,} rows changed by at most {table['largest_difference']:g}, state of "
            f"{table['state_changed']:,} changed"
        )
    dense = difference["dense"]
    lines.append(
        f"  dense: {len(dense['changed'])} tensors changed, {len(dense['only_in_first'])} only in the first, "
        f"{len(dense['only_in_second'])} only in the second"
    )
    lines += [f"    {name}: {change}" for name, change in dense["changed"].items()]
    lines += ["  the shared rows of unknown ids differ"] * difference["shared_rows_differ"]
    lines += ["  what policies remember differs (clock, waiting, pinned or logged ids)"] * difference["policies_differ"]
    return "different:\n" + "\n".join(lines)


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


if __name__ == "__main__":
    sys.exit(main())
