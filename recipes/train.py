"""Trains a retrieval or ranking model over dynamic embedding tables through DeepSpeed.

    python recipes/train.py --output_dir outputs/laptop                               # generated log, one CPU process
    deepspeed --num_accelerators 2 recipes/train.py --config recipes/configs/hstu_ml1m.yaml \\
        --deepspeed_config ds_configs/zero1.json --output_dir outputs/hstu_ml1m --num_train_epochs 10
    deepspeed --module grzoo.recipes.train --config hstu_ml1m --output_dir outputs/hstu_ml1m       # installed

`output_dir` gets metrics.jsonl, checkpoint-N/, report.md with plots, recommendations.json and export/, which
`AutoModelForRetrieval.from_pretrained` (a ranking model: `AutoModelForRanking`) loads. `--help` lists all settings.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from grzoo.data import StepLoader
from grzoo.recipes.assembly import build_collator, build_engine, build_loader, build_model, build_model_config
from grzoo.recipes.best_model import build_best_model
from grzoo.recipes.calibration import measured_cost
from grzoo.recipes.dataset_folder import LoadedData, check_same_data, find_or_prepare, has_split, load
from grzoo.recipes.deepspeed_config import resolve
from grzoo.recipes.evaluation import Evaluator
from grzoo.recipes.exporting import export
from grzoo.recipes.loading import warm_start, warm_start_tables
from grzoo.recipes.metrics_log import MetricsLog
from grzoo.recipes.no_effect import without_effect
from grzoo.recipes.output_folder import check_run_folder, make_run_folder
from grzoo.recipes.provenance import versions
from grzoo.recipes.ranking import (
    build_ranking_config,
    build_ranking_loader,
    build_ranking_model,
    is_ranking,
    ranking_evaluators,
)
from grzoo.recipes.recommending import recommend_to_row, table
from grzoo.recipes.report import metrics_table, write_report
from grzoo.recipes.runtime import Runtime, UserError, connect, run, user_errors
from grzoo.recipes.settings import Settings, read_settings
from grzoo.recipes.summary import describe
from grzoo.recipes.training import TrainingLoop, checkpoint_to_resume, total_steps


def main(runtime: Runtime, argv: list[str]) -> None:
    """One training run, from a log's name to an exported model."""
    settings = read_settings(argv)
    for line in without_effect(settings):
        runtime.say(f"warning  {line}")
    given, output_dir = settings.data.dataset_dir, Path(settings.training.output_dir or "")
    resumes = settings.training.resume_from_checkpoint is not None
    check_run_folder(output_dir, Path(given) if given else None, resumes=resumes)
    with user_errors():
        deepspeed = resolve(settings.training.deepspeed_config, settings.step, settings.optimizer, runtime.world_size)
    runtime.main_first("output_dir", lambda: make_run_folder(output_dir))
    device = connect(runtime, use_cpu=settings.common.use_cpu, local_rank=settings.common.local_rank)
    data = load(find_or_prepare(settings.data, settings.data_options, runtime))
    config, loader, evaluators, make_model = _parts(settings, data, runtime)
    evaluate = evaluators[data.evaluation_split]
    best = build_best_model(settings.training, data.evaluation_split, evaluate.metric_names)
    resume_from = checkpoint_to_resume(settings.training)
    steps = total_steps(settings.training, len(loader.sampler))
    if settings.step.calibrate_cost:
        _calibrate(settings, data, loader, make_model, device, runtime)
    model = make_model()
    init_from = Path(settings.training.init_from) if settings.training.init_from and not resume_from else None
    if init_from is not None:
        with user_errors():
            warm_start(model, init_from)
    engine = build_engine(settings, model, deepspeed, steps)
    if init_from is not None:
        with user_errors():
            warm_start_tables(engine.module, init_from)
        runtime.say(f"began with the weights and rows of {init_from}")
    elif settings.training.init_from:
        runtime.say(f"--init_from has no effect: the run goes on from {resume_from}")
    conditions = describe(settings, data, engine, steps, runtime)
    runtime.say("\n".join(f"{name:<12} {value}" for name, value in conditions.items()))

    log_dir = Path(settings.training.output_dir or "") if runtime.is_main else None
    log = MetricsLog(log_dir, report_to=settings.training.report_to)
    loop = TrainingLoop(
        engine,
        loader,
        settings.training,
        log,
        runtime,
        total_steps=steps,
        evaluate=lambda: evaluate(engine.module),
        identity={
            "model_config": json.loads(config.to_json_string(use_diff=False)),
            "dataset_dir": str(data.folder),
            "data": data.identity(),
            "command": _command(argv),
        },
        best=best,
    )
    if resume_from:
        with user_errors():
            path = loop.resume(resume_from, lambda state, path: check_same_data(state.get("data"), data, path))
        runtime.say(f"resumed at step {loop.step} from {path}")
    log.start_at(loop.step)
    if loop.step == 0:
        log.write(0, 0.0, {f"popularity/{name}": value for name, value in evaluate.popularity().items()})
    loop.run()
    loop.load_best()
    if best is not None and best.keeps:
        conditions["chosen by"] = f"validation {best}"
        runtime.say(f"best     {best}: this model is tested and exported")
    _finish(settings, data, engine, loop, evaluators, conditions, argv, runtime)
    log.close()


def _parts(
    settings: Settings, data: LoadedData, runtime: Runtime
) -> tuple[Any, StepLoader, Mapping[str, Any], Callable[[], Any]]:
    """Config, batches, evaluators and the maker of the model, for retrieval or for ranking."""
    config: Any
    if is_ranking(settings.model_options.get("model_type")):
        config = build_ranking_config(settings, data.schema)
        loader = build_ranking_loader(settings, data, config, runtime)
        evaluators = ranking_evaluators(settings, data, config, runtime)
        return config, loader, evaluators, lambda: build_ranking_model(settings, config)
    config = build_model_config(settings, has_timestamps=data.train.has_timestamps, num_items=len(data.catalogue))
    loader = build_loader(settings, data, config, runtime)
    return config, loader, _evaluators(settings, data, config, runtime), lambda: build_model(settings, config)


def _calibrate(
    settings: Settings,
    data: LoadedData,
    loader: StepLoader,
    make_model: Callable[[], Any],
    device: torch.device,
    runtime: Runtime,
) -> None:
    """Has the loader balance by measured time."""
    if is_ranking(settings.model_options.get("model_type")):
        raise UserError("--calibrate_cost measures retrieval models; ranking models are balanced by their FLOPs")
    cost = measured_cost(
        make_model,
        lambda dataset: build_collator(settings, dataset, data.catalogue),
        data.catalogue.ids,
        min(settings.data.max_length, int(data.train.lengths.max()) - 1),
        device,
        runtime,
    )
    loader.balance_by(cost)
    runtime.say(f"{'balance':<12} measured: {cost.linear:.3g} s per token + {cost.quadratic:.3g} s per squared length")


def _finish(
    settings: Settings,
    data: LoadedData,
    engine: Any,
    loop: TrainingLoop,
    evaluators: Mapping[str, Any],
    conditions: dict[str, str],
    argv: list[str],
    runtime: Runtime,
) -> None:
    """Final metrics beside the baseline, sample recommendations, the export and the report."""
    output_dir = Path(settings.training.output_dir or "")
    metrics, baseline = _final_metrics(loop, evaluators, engine)
    ranks_candidates = is_ranking(engine.module.config.model_type)
    sample = None if ranks_candidates else recommend_to_row(engine.module, data.folder, row=0, top_k=10)
    command = _command(argv)
    folder = output_dir / "export"
    export(engine, data, folder, metrics=metrics, baseline=baseline, conditions=conditions, command=command)
    if not runtime.is_main:
        return
    if sample is not None:
        (output_dir / "recommendations.json").write_text(json.dumps(sample, indent=1) + "\n")
    title = f"{type(engine.module).__name__} on {data.schema.name}"
    report = write_report(output_dir, title=title, conditions={**conditions, **versions(), "command": command})
    filtered = "left out" if settings.evaluation.exclude_seen else "kept in"
    protocol = f"full ranking of {len(data.catalogue):,} items, seen items {filtered}"
    print(f"\ntest split, {'every exposure once' if ranks_candidates else protocol}")
    print(metrics_table(metrics, baseline))
    if sample is not None:
        print(f"\nuser {sample['user']} gets\n{table(sample)}\n")
    print(f"report {report}\nexport {folder}", flush=True)


def _command(argv: list[str]) -> str:
    """The command line, as it would be given again."""
    return " ".join(["train.py", *(word for word in argv if not word.startswith("--local_rank"))])


def _final_metrics(
    loop: TrainingLoop, evaluators: Mapping[str, Any], engine: Any
) -> tuple[dict[str, float], dict[str, float]]:
    """Model and baseline on the test split; what the last evaluation of this very split found is not computed again."""
    test = evaluators["test"]
    baseline = test.popularity()
    if len(evaluators) == 1 and loop.last_evaluation is not None and loop.last_evaluation[0] == loop.step:
        metrics = loop.last_evaluation[1]
    else:
        metrics = test(engine.module)
    values = {f"test/{name}": value for name, value in metrics.items()}
    values |= {f"test/popularity/{name}": value for name, value in baseline.items()}
    if loop.best is not None and loop.best.keeps:
        values |= loop.best.metrics()
    loop.log.write(loop.step, loop.epoch, values)
    return metrics, baseline


def _evaluators(settings: Settings, data: LoadedData, config: Any, runtime: Runtime) -> dict[str, Evaluator]:
    splits = ["validation", "test"] if has_split(data.folder, "validation") else ["test"]
    with user_errors():
        return {
            split: Evaluator(
                data.folder,
                split,
                data.catalogue,
                settings.evaluation,
                runtime,
                max_length=settings.data.max_length,
                max_tokens=settings.step.max_tokens_per_device,
                cost=config.flops,
            )
            for split in splits
        }


if __name__ == "__main__":
    run(main)
