"""Ranks a split of a dataset folder with a trained model, beside the popularity baseline.

    python recipes/evaluate.py --model outputs/demo/export --dataset_dir outputs/demo/dataset
    deepspeed --num_accelerators 2 recipes/evaluate.py --model outputs/demo/checkpoint-180 \\
        --dataset_dir outputs/demo/dataset
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist
from grzoo.recipes.arguments import CommonArguments, EvaluationArguments, option
from grzoo.recipes.dataset_folder import has_split, load
from grzoo.recipes.evaluation import Evaluator
from grzoo.recipes.known_items import strangers
from grzoo.recipes.loading import load_model
from grzoo.recipes.parsing import parse
from grzoo.recipes.ranking import RankingEvaluator, is_ranking
from grzoo.recipes.report import metrics_table
from grzoo.recipes.runtime import Runtime, UserError, connect, run, user_errors
from grzoo.recipes.settings import check_numbers


@dataclass
class EvaluateArguments:
    """What to rank with, and what."""

    model: str | None = option(None, "An export folder, or a checkpoint-N of a training run.")
    dataset_dir: str | None = option(None, "A dataset folder.")
    split: Literal["validation", "test"] = option("test", "Which events to rank.")
    max_candidates: int = option(50, "Ranking: as in training, exposures of a user in one sample at most.")
    num_recent: int | None = option(
        None, "Ranking: events before a sample that count as real-time history; default: as in training (the config)."
    )
    output_file: str | None = option(None, "Also write the metrics as JSON.")


def main(runtime: Runtime, argv: list[str]) -> None:
    """Loads the model sharded over the ranks, ranks, prints."""
    classes = [CommonArguments, EvaluateArguments, EvaluationArguments]
    (common, arguments, evaluation), _ = parse(classes, argv, sections=())
    check_numbers([arguments, evaluation])
    if arguments.model is None or arguments.dataset_dir is None:
        raise UserError("give --model, an export folder or a checkpoint, and --dataset_dir, a dataset folder")
    output = Path(arguments.output_file) if arguments.output_file else None
    if output is not None and not output.absolute().parent.is_dir():
        raise UserError(f"--output_file {output} cannot be written: {output.parent} is no folder")
    data = load(Path(arguments.dataset_dir))
    if not has_split(data.folder, arguments.split):
        raise UserError(
            f"{data.folder} has no {arguments.split} split: prepare it with prepare_data.py --validation last"
        )
    device = connect(runtime, use_cpu=common.use_cpu, local_rank=common.local_rank)
    group = dist.group.WORLD if runtime.world_size > 1 else None
    with user_errors():
        model = load_model(Path(arguments.model), group).to(device)
        for line in strangers(model, Path(arguments.model), data):
            runtime.say(f"warning  {line}")
        length = model.config.max_sequence_length
        evaluator: Any
        if is_ranking(model.config.model_type):
            evaluator = RankingEvaluator(
                data.folder,
                arguments.split,
                data.catalogue,
                model.config,
                runtime,
                batch_size=evaluation.eval_batch_size,
                max_candidates=arguments.max_candidates,
                num_recent=arguments.num_recent,
            )
        else:
            evaluator = Evaluator(data.folder, arguments.split, data.catalogue, evaluation, runtime, max_length=length)
        metrics, baseline = evaluator(model), evaluator.popularity()
    seen = "left out" if evaluation.exclude_seen else "kept in"
    protocol = "every exposure once" if is_ranking(model.config.model_type) else f"full ranking, seen items {seen}"
    runtime.say(f"{arguments.split} split of {data.schema.name}, {protocol}")
    runtime.say(metrics_table(metrics, baseline))
    if output is not None and runtime.is_main:
        output.write_text(json.dumps({"eval": metrics, "popularity": baseline}, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
