"""Makes a Hugging Face folder of a checkpoint: `AutoModelForRetrieval.from_pretrained` loads it.

python recipes/export.py --checkpoint outputs/demo/checkpoint-180 --output_dir outputs/demo/export-180
"""

from dataclasses import dataclass
from pathlib import Path

from grzoo.data import GenRecProcessor
from grzoo.recipes.arguments import option
from grzoo.recipes.loading import checkpoint_state, is_checkpoint, load_model
from grzoo.recipes.parsing import parse
from grzoo.recipes.runtime import Runtime, UserError, run, user_errors


@dataclass
class ExportArguments:
    """From where to where."""

    checkpoint: str | None = option(None, "A checkpoint-N of a training run.")
    output_dir: str | None = option(None, "The folder to write.")
    dataset_dir: str | None = option(None, "Dataset folder for the processor; default: that of the training run.")
    push_to_hub: str | None = option(None, "Also upload to this repository, user/name.")


def main(runtime: Runtime, argv: list[str]) -> None:
    """Reads the checkpoint in one process, writes the folder, uploads it when asked."""
    (arguments,), _ = parse([ExportArguments], argv)
    if arguments.checkpoint is None or arguments.output_dir is None:
        raise UserError("give --checkpoint, a checkpoint-N folder, and --output_dir")
    checkpoint, folder = Path(arguments.checkpoint), Path(arguments.output_dir)
    if not is_checkpoint(checkpoint):
        raise UserError(f"{checkpoint} is no complete checkpoint: give a checkpoint-N folder of a training run")
    with user_errors():
        dataset = Path(arguments.dataset_dir or checkpoint_state(checkpoint)["dataset_dir"])
        model = load_model(checkpoint)
        processor = GenRecProcessor.from_dataset(dataset, max_length=model.config.max_sequence_length)
        processor.save_pretrained(folder)
        if arguments.push_to_hub:
            model.save_pretrained(folder, push_to_hub=True, repo_id=arguments.push_to_hub)
        else:
            model.save_pretrained(folder)
    runtime.say(f"wrote {folder}")


if __name__ == "__main__":
    run(main)
