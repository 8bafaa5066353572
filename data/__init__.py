"""From a log of events to balanced, jagged batches: dataset folder, sampler, collator, loader, processor."""

from typing import TYPE_CHECKING, Any

from .balancing import MicroBatchPlan, bin_costs, partition, plan_micro_batches, token_cost
from .batch_sampler import BalancedBatchSampler
from .catalogue import Catalogue
from .collator import EvalCollator, GenRecCollator, GlobalStep, MicroBatch
from .dataset import EventDataset, JaggedRows
from .loader import EvalLoader, StepLoader
from .negatives import AllItems, SharedNegatives, UniformNegatives
from .ranking import ExposureWindows, RankingCollator, RankingSamples
from .sampler import GlobalBatchSampler, permute
from .schema import DatasetSchema, FeatureSpec
from .windows import EveryTarget, RecentFirst, Samples, SlidingWindows, StochasticLength

if TYPE_CHECKING:
    from .processor import GenRecProcessor

__all__ = [
    "AllItems",
    "BalancedBatchSampler",
    "Catalogue",
    "DatasetSchema",
    "EvalCollator",
    "EvalLoader",
    "ExposureWindows",
    "EventDataset",
    "EveryTarget",
    "FeatureSpec",
    "GenRecCollator",
    "GenRecProcessor",
    "GlobalBatchSampler",
    "GlobalStep",
    "JaggedRows",
    "MicroBatch",
    "MicroBatchPlan",
    "RankingCollator",
    "RankingSamples",
    "RecentFirst",
    "Samples",
    "SharedNegatives",
    "SlidingWindows",
    "StepLoader",
    "StochasticLength",
    "UniformNegatives",
    "bin_costs",
    "partition",
    "permute",
    "plan_micro_batches",
    "token_cost",
]


def __getattr__(name: str) -> Any:
    # transformers takes a second to import, and training workers do not need it.
    if name == "GenRecProcessor":
        from .processor import GenRecProcessor

        return GenRecProcessor
    raise AttributeError(f"module 'grzoo.data' has no attribute {name!r}")
