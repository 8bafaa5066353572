"""Make a dataset folder from a public data set, from an event log, or from the synthetic generator.

python recipes/prepare_data.py synthetic --output_dir data_folders/synthetic
python recipes/prepare_data.py ml-1m --output_dir data_folders/ml-1m [--source PATH]
python recipes/prepare_data.py event_log --source log.csv --user_column u --item_column i --timestamp_column t
--output_dir D
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, cast

from grzoo.data.prepare import PrepareConfig, prepare
from grzoo.recipes.runtime import plain_warnings
from pyarrow import ArrowException
from transformers import HfArgumentParser


def parse(arguments: Sequence[str]) -> PrepareConfig:
    """The options of a command line; the data set's name may come first without `--name`."""
    words = list(arguments)
    if words and not words[0].startswith("-"):
        words = ["--name", *words]
    parser = HfArgumentParser(cast(Any, PrepareConfig), description=__doc__)
    (config,) = parser.parse_args_into_dataclasses(words)
    return config


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0, or 2 after a message about what is wrong with the input."""
    plain_warnings()
    try:
        started = time.perf_counter()
        config = parse(sys.argv[1:] if arguments is None else arguments)
        report = prepare(**asdict(config))
    except (ValueError, OSError, ArrowException) as error:
        print(f"prepare_data: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("prepare_data: stopped; nothing was written", file=sys.stderr)
        return 130
    print("\n".join(report.lines()))
    print(f"wrote {config.output_dir} in {time.perf_counter() - started:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
