"""What the configurations of all ranking models hold: features, tasks, tables."""

from typing import Any, Literal

from grzoo.embeddings import FeatureConfig, TableConfig, policies_by_table
from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

MAX_BITS = 63


@strict
class RankingConfig(PreTrainedConfig):
    r"""Features and tasks of a ranking model; architectures add their own fields.

    Args:
        hidden_size: D, width of a token.
        embedding_dim: width of a row of every table.
        user_features: names of the profile features, ids; `user_features[..., p]` of a batch is the p-th.
        event_features: names of what is known of a past event besides its item, ids (an action, a channel).
        item_features: name -> number of flags of a multi-hot feature of an item, one int64 of bits for each (genres).
        cross_features: names of the dense features of a (user, candidate) pair.
        tasks: names of the binary labels; None: "click".
        max_sequence_length: events of a history that are kept, the last ones.
        num_recent: events before a user's first candidate that are the real-time part of the history, as in training;
            a batch that brings its own `num_recent` overrides it. None: all events. What the real-time part is for says
            the model: MTGR normalises and masks it in another way, the others treat all events alike.
        hidden_dropout: dropout of the tokens and of each block.
        initializer: how new rows are drawn, see `grzoo.embeddings.TableConfig`.
        unknown_ids: row of an id that a table does not hold, when reading: "zeros" or "initial".
        table_policies: admission, eviction, max_rows, track_use and placement of tables, by their names; see
            TableConfig.
        embedding_seed: seed of the initial rows.
        layer_norm_eps: of all normalisations.
    """

    hidden_size: int = 64
    embedding_dim: int = 32
    user_features: list[str] | None = None
    event_features: list[str] | None = None
    item_features: dict[str, int] | None = None
    cross_features: list[str] | None = None
    tasks: list[str] | None = None
    max_sequence_length: int = 200
    num_recent: int | None = None
    hidden_dropout: float | int = 0.0
    initializer: dict[str, Any] | None = None
    unknown_ids: Literal["zeros", "initial"] = "zeros"
    table_policies: dict[str, dict[str, Any]] | None = None
    embedding_seed: int = 0
    layer_norm_eps: float | int = 1e-6

    def __post_init__(self, **kwargs: Any) -> None:
        self.user_features = list(self.user_features or [])
        self.event_features = list(self.event_features or [])
        self.item_features = dict(self.item_features or {})
        self.cross_features = list(self.cross_features or [])
        self.tasks = ["click"] if self.tasks is None else list(self.tasks)
        if self.initializer is None:
            self.initializer = {"kind": "truncated_normal", "std": 0.02}
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Raises ValueError for values that no model can be built of."""
        name = type(self).__name__
        for field in self.positive_fields():
            if not getattr(self, field) > 0:
                raise ValueError(f"{name}: {field} must be positive; got {getattr(self, field)}.")
        if not 0 <= self.hidden_dropout < 1:
            raise ValueError(f"{name}: hidden_dropout must lie in [0, 1); got {self.hidden_dropout}.")
        if not self.tasks:
            raise ValueError(f'{name}: tasks is {self.tasks}; name at least one, or leave it out for ["click"].')
        if self.num_recent is not None and self.num_recent < 0:
            raise ValueError(f"{name}: num_recent must be at least 0, or None for all events; got {self.num_recent}.")
        for field in ("user_features", "event_features", "cross_features", "tasks"):
            names = getattr(self, field)
            if len(set(names)) != len(names):
                raise ValueError(f"{name}: {field} has a name twice: {names}.")
        assert self.item_features is not None
        for feature, bits in self.item_features.items():
            if not 0 < bits <= MAX_BITS:
                raise ValueError(
                    f"{name}: item_features[{feature!r}] has {bits} flags; one int64 holds 1 to {MAX_BITS}."
                )
        self.embedding_tables()

    def positive_fields(self) -> tuple[str, ...]:
        """Fields that must be above zero."""
        return ("hidden_size", "embedding_dim", "max_sequence_length", "layer_norm_eps")

    def embedding_tables(self) -> list[TableConfig]:
        """The dynamic tables: items, and one for each user and event feature."""
        assert self.initializer is not None
        names = ["items", *self.user_tables, *self.event_tables]
        return [
            TableConfig(
                name=name,
                embedding_dim=self.embedding_dim,
                initializer=self.initializer,
                unknown=self.unknown_ids,
                **policies,
            )
            for name, policies in policies_by_table(self.table_policies, names).items()
        ]

    def embedding_features(self) -> list[FeatureConfig]:
        """Which field of a micro-batch looks up which table."""
        items = [FeatureConfig(name=name, table="items") for name in ("input_ids", "candidate_ids")]
        return items + [FeatureConfig(name=name, table=name) for name in (*self.user_tables, *self.event_tables)]

    @property
    def user_tables(self) -> list[str]:
        """Table of each user feature."""
        return [f"user_{name}" for name in self.user_features or []]

    @property
    def event_tables(self) -> list[str]:
        """Table of each event feature."""
        return [f"event_{name}" for name in self.event_features or []]


__all__ = ["RankingConfig"]
