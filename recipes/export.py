"""Makes a Hugging Face folder of a checkpoint: `AutoModelForRetrieval.from_pretrained` loads it.

python recipes/export.py --checkpoint outputs/demo/checkpoint-180 --output_dir outputs/demo/export-180

Tables that keep the use of their rows can be pruned: --min_count 3 --used_since 120.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from grzoo.data import GenRecProcessor
from grzoo.recipes.arguments import option
from grzoo.recipes.dataset_folder import LoadedData, check_same_data, load
from grzoo.recipes.loading import checkpoint_state, is_checkpoint, load_model
from grzoo.recipes.metrics_log import evaluation_before
from grzoo.recipes.model_card import model_card
from grzoo.recipes.output_folder import check_export_folder
from grzoo.recipes.parsing import parse
from grzoo.recipes.pruning import prune
from grzoo.recipes.runtime import Runtime, UserError, run, user_errors


@dataclass
class ExportArguments:
    """From where to where."""

    checkpoint: str | None = option(None, "A checkpoint-N of a training run.")
    output_dir: str | None = option(None, "The folder to write.")
    dataset_dir: str | None = option(None, "Dataset folder for the processor; default: that of the training run.")
    row_dtype: Literal["float32", "bfloat16"] | None = option(None, "Of the rows in the files; default: as trained.")
    license: str | None = option(None, "Licence for the model card, by the hub's name for it, as apache-2.0.")
    min_count: int | None = option(None, "Leave rows out whose id occurred less often in training (track_use).")
    used_since: int | None = option(None, "Leave rows out that no optimizer step from this one on used (track_use).")
    push_to_hub: str | None = option(None, "Also upload to this repository, user/name.")


def main(runtime: Runtime, argv: list[str]) -> None:
    """Reads the checkpoint in one process, writes the folder, uploads it when asked."""
    (arguments,), _ = parse([ExportArguments], argv, sections=())
    if arguments.checkpoint is None or arguments.output_dir is None:
        raise UserError("give --checkpoint, a checkpoint-N folder, and --output_dir")
    checkpoint, folder = Path(arguments.checkpoint), Path(arguments.output_dir)
    if not is_checkpoint(checkpoint):
        raise UserError(f"{checkpoint} is no complete checkpoint: give a checkpoint-N folder of a training run")
    check_export_folder(folder)
    with user_errors():
        state = checkpoint_state(checkpoint)
        data = load(Path(arguments.dataset_dir or state["dataset_dir"]))
        check_same_data(state.get("data"), data, str(checkpoint))
        model = load_model(checkpoint)
        pruned = _pruned(arguments, model, checkpoint)
        processor = GenRecProcessor.from_dataset(data.folder, max_length=model.config.max_sequence_length)
        processor.save_pretrained(folder)
        (folder / "README.md").write_text(_card(model, data, checkpoint, state, pruned, arguments.license))
        options: dict[str, Any] = {"row_dtype": arguments.row_dtype}
        if arguments.push_to_hub:
            options |= {"push_to_hub": True, "repo_id": arguments.push_to_hub}
        model.save_pretrained(folder, **options)
    runtime.say(f"wrote {folder}")


def _pruned(arguments: ExportArguments, model: Any, checkpoint: Path) -> dict[str, str]:
    """Leave rows out as the options say; what the model card says of it."""
    limits = {"min_count": arguments.min_count, "used_since": arguments.used_since}
    if all(limit is None for limit in limits.values()):
        return {}
    rows = prune(model, checkpoint, **limits)
    rule = ", ".join(f"{name} {limit}" for name, limit in limits.items() if limit is not None)
    left = "; ".join(f"{table}: {count}" for table, count in rows.items())
    return {"pruned": f"{left} are left ({rule}); results are those of the model before"}


def _card(
    model: Any,
    data: LoadedData,
    checkpoint: Path,
    state: dict[str, Any],
    pruned: dict[str, str],
    license: str | None,
) -> str:
    """The model card: the last evaluation up to the checkpoint in the run's metrics.jsonl, if there is one."""
    metrics, baseline = evaluation_before(checkpoint.resolve().parent / "metrics.jsonl", state.get("step"))
    conditions = {
        "checkpoint": checkpoint.name,
        "step": str(state.get("step", "unknown")),
        "data": f"{data.schema.name}: {len(data.train):,} users, {len(data.catalogue):,} items",
        "evaluated on": f"{data.evaluation_split} split" if metrics else "not evaluated before this checkpoint",
        **pruned,
    }
    command = state.get("command", "unknown: the checkpoint does not say")
    return model_card(
        model,
        data,
        metrics=metrics,
        baseline=baseline,
        conditions=conditions,
        command=command,
        split=data.evaluation_split,
        license=license,
    )


if __name__ == "__main__":
    run(main)
