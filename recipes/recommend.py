"""Recommends items after a history, with an exported model; needs neither DeepSpeed nor a compiler.

python recipes/recommend.py --model outputs/demo/export --history 12,7,431 --top_k 10
python recipes/recommend.py --model outputs/demo/export --dataset_dir outputs/demo/dataset --user 3
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grzoo.data import GenRecProcessor
from grzoo.models import AutoModelForRetrieval
from grzoo.recipes.arguments import option
from grzoo.recipes.dataset_folder import load
from grzoo.recipes.known_items import strangers
from grzoo.recipes.parsing import parse
from grzoo.recipes.recommending import differences, recommend, recommend_to_row, table
from grzoo.recipes.runtime import Runtime, UserError, run, user_errors
from grzoo.recipes.settings import check_numbers
from transformers.utils.logging import disable_progress_bar


@dataclass
class RecommendArguments:
    """Which model, and for whom."""

    model: str | None = option(None, "An export folder.")
    history: str | None = option(None, "Item ids of the data set, the oldest first, separated by commas.")
    timestamps: str | None = option(None, "Seconds, one per item of the history, separated by commas.")
    user: int | None = option(None, "Row of the test split whose history to take; needs --dataset_dir.")
    dataset_dir: str | None = option(None, "A dataset folder.")
    expect: str | None = option(None, "A recommendations.json: repeat it and fail when anything differs.")
    top_k: int = option(10, "How many items.")


def main(runtime: Runtime, argv: list[str]) -> None:
    """Loads, recommends, prints; exit code 1 when `--expect` is not met."""
    (arguments,), _ = parse([RecommendArguments], argv, sections=())
    check_numbers([arguments])
    if arguments.model is None:
        raise UserError("give --model, an export folder")
    if sum(given is not None for given in (arguments.history, arguments.user, arguments.expect)) != 1:
        raise UserError("give one of --history, --user (with --dataset_dir) and --expect")
    if arguments.timestamps is not None and arguments.history is None:
        raise UserError("--timestamps goes with --history: --user and --expect bring their own")
    if arguments.dataset_dir is not None and arguments.user is None:
        raise UserError("--dataset_dir goes with --user: --history and --expect need none")
    if not (Path(arguments.model) / "config.json").is_file():
        raise UserError(f"{arguments.model} holds no model: give the export folder of a training run")
    disable_progress_bar()
    with user_errors():
        model = AutoModelForRetrieval.from_pretrained(arguments.model).eval()
        processor = GenRecProcessor.from_pretrained(arguments.model)
        result, expected = _recommend(arguments, model, processor)
    print(table(result))
    if expected is None:
        return
    problem = differences(result, expected)
    print(f"DIFFERENT from {arguments.expect}: {problem}" if problem else f"identical to {arguments.expect}")
    if problem:
        raise SystemExit(1)


def _recommend(
    arguments: RecommendArguments, model: Any, processor: GenRecProcessor
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    if arguments.user is not None:
        if arguments.dataset_dir is None:
            raise UserError("--user needs --dataset_dir, the dataset folder whose test split has the user")
        folder = Path(arguments.dataset_dir)
        for line in strangers(model, Path(arguments.model or ""), load(folder)):
            print(f"warning  {line}", flush=True)
        found = recommend_to_row(model, folder, row=arguments.user, top_k=arguments.top_k)
        return found, None
    if arguments.expect is not None:
        expected = _expected(Path(arguments.expect))
        wanted = {key: expected[key] for key in ("history", "timestamps", "request_timestamp")}
        return recommend(model, processor, **wanted, top_k=len(expected["recommendations"])), expected
    history = [_item(text, processor) for text in (arguments.history or "").split(",") if text.strip()]
    if unknown := unknown_items(history, processor):
        print(f"warning  not in the catalogue of the model: {', '.join(unknown)}", flush=True)
    times = None if arguments.timestamps is None else _seconds(arguments.timestamps)
    return recommend(model, processor, history, timestamps=times, top_k=arguments.top_k), None


def unknown_items(history: list[Any], processor: GenRecProcessor) -> list[str]:
    """The items of a history that the catalogue lacks; those of text have a hash and are looked up all the same."""
    known = processor.catalogue.encode(history)[1]
    return [str(item) for item, found in zip(history, known, strict=True) if not found]


def _seconds(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise UserError(f"--timestamps takes whole seconds separated by commas, got {text!r}") from None


def _expected(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON ({error}): give a recommendations.json") from error
    keys = {"history", "timestamps", "request_timestamp", "recommendations"}
    if not isinstance(found, dict) or not keys <= set(found):
        raise UserError(f"{path} is no recommendations.json of a training run: it lacks some of {sorted(keys)}")
    return found


def _item(text: str, processor: GenRecProcessor) -> Any:
    """An original id: an integer where the catalogue's are, else text."""
    text = text.strip()
    if processor.catalogue.original_ids.type != "int64":
        return text
    try:
        return int(text)
    except ValueError:
        raise UserError(f"item id {text!r} is not an integer, and those of this catalogue are") from None


if __name__ == "__main__":
    run(main)
