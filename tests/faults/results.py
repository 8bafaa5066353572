"""What the long fault tests found, as rows of one CSV file: $GRZOO_FAULTS_RESULTS, which `make faults` sets."""

import os
from pathlib import Path

from grzoo.recipes.benchmark.reporting import write_rows


def report(case: str, *, events: int, unusable: int, differing: int, seconds: float, detail: str) -> None:
    """One row.

    events: crashes, kills or damages that were tried. unusable: after how many no complete checkpoint was found, or a
    damaged one was loaded. differing: losses or states that were not those expected.
    """
    path = os.environ.get("GRZOO_FAULTS_RESULTS")
    row: dict[str, object] = {
        "case": case,
        "events": events,
        "unusable": unusable,
        "differing": differing,
        "seconds": round(seconds, 1),
    }
    row["detail"] = detail
    if path is None:
        print(row)
    else:
        write_rows([row], Path(path))
