"""The settings of the recipes, under the names of transformers' TrainingArguments where it has them.

Every field is a key of a recipe's YAML and a command-line flag. Hyperparameters of the model itself stand under
`model:` in the YAML and as `--model.NAME VALUE` on the command line; its configuration class validates them.
"""

from dataclasses import dataclass, field
from typing import Any, Literal


def option(default: Any, text: str) -> Any:
    """A dataclass field with its line of `--help`."""
    return field(default=default, metadata={"help": text})


@dataclass
class CommonArguments:
    """What every recipe that runs on ranks takes."""

    config: str | None = option(None, "YAML file of settings, or a built-in one by name; the command line wins.")
    use_cpu: bool = option(False, "Compute on the CPU although there is a GPU.")
    local_rank: int = option(-1, "Given by launchers that do not set LOCAL_RANK.")


@dataclass
class DataArguments:
    """Which log, and how much of each history. How it is split and prepared stands under `data:`."""

    dataset: str | None = option(None, "A log that prepare_data knows, by name; default: synthetic.")
    source: str | None = option(None, "Raw files of the log; default: $GRZOO_DATA/<dataset>, else the download.")
    dataset_dir: str | None = option(None, "A dataset folder that is already prepared, or where to prepare it.")
    max_length: int = option(200, "Events of a history that the model sees; older ones are cut off.")
    windows: Literal["recent", "sliding", "stochastic"] = option(
        "recent",
        "Of a history longer than max_length, an epoch trains: its end (recent), all of it in windows that overlap "
        "(sliding), or an end of random length (stochastic, as HSTU's paper).",
    )
    window_overlap: float = option(0.5, "sliding: share of a window that is context from the one before.")
    stochastic_alpha: float = option(1.6, "stochastic: of N inputs about N^(alpha/2) are kept; 2 keeps all.")
    shuffle_block_size: int | None = option(
        None, "Shuffle blocks of so many rows, for logs larger than the page cache; default: all rows."
    )
    max_candidates: int = option(50, "Ranking: exposures of a user in one sample at most.")
    num_recent: int = option(20, "Ranking: events before a sample's first exposure that count as real-time history.")
    dataloader_num_workers: int = option(0, "Processes that build batches; 0: in the training process.")
    dataloader_prefetch_factor: int | None = option(None, "Steps that each of them builds ahead; default: 2.")
    dataloader_pin_memory: bool = option(True, "Batches in pinned memory, where they go to a GPU.")

    @property
    def log_name(self) -> str:
        """The log that is prepared where there is no dataset folder yet."""
        return self.dataset or "synthetic"


@dataclass
class EvaluationArguments:
    """Full ranking over the whole catalogue."""

    top_k: list[int] = field(
        default_factory=lambda: [5, 10, 20, 50, 200], metadata={"help": "Cutoffs of HR@k and NDCG@k."}
    )
    exclude_seen: bool = option(True, "Leave the items of the user's history out of the ranking.")
    eval_batch_size: int = option(256, "Users scored at a time, over all ranks.")


@dataclass
class OptimizerArguments:
    """Dense parameters and embedding tables: two optimizers, one schedule."""

    learning_rate: float = option(1e-3, "Peak learning rate of the dense parameters.")
    weight_decay: float = option(0.0, "Decoupled weight decay of the dense parameters.")
    adam_beta1: float = option(0.9, "AdamW's first moment, dense and sparse.")
    adam_beta2: float = option(0.98, "AdamW's second moment, dense and sparse.")
    adam_epsilon: float = option(1e-8, "AdamW's epsilon, dense and sparse.")
    max_grad_norm: float = option(0.0, "Clips dense and sparse gradients, each by its own norm; 0: off.")
    lr_scheduler_type: Literal["constant", "linear", "cosine", "constant_with_warmup"] = option(
        "constant", "Schedule of both learning rates."
    )
    warmup_steps: int = option(0, "Steps of linear warm-up.")
    sparse_optimizer: Literal["sgd", "adagrad", "rowwise_adagrad", "adam", "adamw"] = option(
        "adamw", "Optimizer of the embedding tables."
    )
    sparse_learning_rate: float | None = option(None, "Peak learning rate of the tables; default: learning_rate.")
    sparse_weight_decay: float = option(0.0, "Weight decay of the rows that a step touches (adamw, adam, sgd).")

    @property
    def table_learning_rate(self) -> float:
        """Peak learning rate of the tables."""
        return self.learning_rate if self.sparse_learning_rate is None else self.sparse_learning_rate


@dataclass
class StepArguments:
    """What a step is made of."""

    global_batch_size: int = option(128, "Users per optimizer step, over all ranks and micro-batches.")
    max_tokens_per_device: int | None = option(None, "Events of one micro-batch at most; default: no limit.")
    micro_batches: int | None = option(
        None, "Micro-batches per step and rank; default: the fewest that keep within max_tokens_per_device."
    )
    calibrate_cost: bool = option(
        False,
        "Before training, measure what samples of several lengths take, and balance by that instead of by FLOPs; "
        "results stay, the time of a step changes.",
    )
    negative_sampling: Literal["uniform", "shared", "all"] = option(
        "uniform",
        "Negatives: drawn per event over the catalogue, shared by the global batch with logQ correction, or all items.",
    )
    num_negatives: int = option(128, "Negatives per event (uniform) or per step (shared).")
    bf16: bool = option(False, "Train the dense parameters in bfloat16 with float32 masters.")
    backend: Literal["auto", "naive", "host"] = option("auto", "Kernels of the embedding tables.")


@dataclass
class TrainingArguments:
    """How long, what is kept, what is written."""

    seed: int = option(42, "The seed of everything random.")
    output_dir: str | None = option(None, "Where metrics, checkpoints, the report and the export go.")
    num_train_epochs: float = option(3.0, "Passes over the training users.")
    max_steps: int = option(-1, "Optimizer steps; overrides num_train_epochs when positive.")
    logging_steps: int = option(50, "Steps between two lines of training metrics.")
    eval_strategy: Literal["no", "steps", "epoch"] = option("epoch", "When to rank the evaluation users.")
    eval_steps: int = option(1000, "Steps between two evaluations, for eval_strategy=steps.")
    eval_epochs: int = option(1, "Epochs between two evaluations, for eval_strategy=epoch.")
    save_strategy: Literal["no", "steps", "epoch", "best"] = option(
        "epoch", "When to write checkpoint-N; best: after an evaluation that is the best so far."
    )
    save_steps: int = option(1000, "Steps between two checkpoints, for save_strategy=steps.")
    save_total_limit: int = option(2, "Checkpoints that are kept, 0: all; the oldest is deleted first, the best never.")
    load_best_model_at_end: bool = option(
        False, "Save after each evaluation that is the best so far; at the end load, test and export that model."
    )
    metric_for_best_model: str | None = option(None, "What is best; default: ndcg@10, of ranking models auc.")
    early_stopping_patience: int | None = option(
        None, "Stop after so many evaluations without a better one; default: never."
    )
    early_stopping_threshold: float = option(0.0, "By how much an evaluation must be better to end that waiting.")
    resume_from_checkpoint: str | None = option(
        None, "A checkpoint folder, or 'last' (or 'true') for the newest in output_dir."
    )
    init_from: str | None = option(
        None, "Warm start: weights and rows of an export or a checkpoint-N, with fresh optimizers and a new data order."
    )
    report_to: Literal["none", "tensorboard"] = option("none", "A tracker beside metrics.jsonl.")
    deepspeed_config: str | None = option(None, "DeepSpeed JSON; default: ZeRO stage 1.")
    disable_tqdm: bool = option(False, "No progress bar.")
