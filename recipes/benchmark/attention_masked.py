"""MTGR's attention as a benchmark: silu under the dynamic mask over profile, history and candidates of each user."""

from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
import torch
from grzoo.models.ops.silu_attention import (
    ALWAYS,
    NEVER,
    STATIC,
    Visibility,
    silu_attention_eager,
    silu_attention_host,
)
from grzoo.models.packing import JaggedLayout
from torch import Tensor
from torch.nn import functional as F

from .attention_workloads import BASELINES, Step, leaves_of

PROFILE, RECENT = 4, 20  # tokens


@dataclass
class MaskedWorkload:
    """Users of [profile | long-term history | real-time events | candidates], inputs of one comparison.

    The real-time part, up to 20 events, happens between the candidates; events see what is before them, candidates the
    events before theirs and themselves.
    """

    name: str
    histories: list[int]
    candidates: list[int]
    source: str
    heads: int
    head_dim: int
    rounds: int
    lengths: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.lengths = [PROFILE + h + c for h, c in zip(self.histories, self.candidates, strict=True)]
        self.tokens = sum(self.lengths)
        generator = torch.Generator().manual_seed(0)
        shape = (self.tokens, self.heads, self.head_dim)
        self.query, self.key, self.value, self.grad = (torch.randn(shape, generator=generator) for _ in range(4))
        times = [self._times(h, c, generator) for h, c in zip(self.histories, self.candidates, strict=True)]
        query_times, key_times = (torch.cat(x) for x in zip(*times, strict=True))
        self.visibility = Visibility(query_times, key_times)
        self.divisors = torch.repeat_interleave(torch.tensor(self.lengths), torch.tensor(self.lengths)).float()

    def _times(self, history: int, candidates: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        recent = min(RECENT, history)
        static = PROFILE + history - recent
        events = torch.randint(0, 10_000, (recent,), generator=generator).sort().values
        asked = torch.randint(0, 10_000, (candidates,), generator=generator).sort().values
        query = torch.cat([torch.full((static,), STATIC), events, asked])
        return query, torch.cat([torch.full((static,), ALWAYS), events, torch.full((candidates,), NEVER)])

    def steps(self) -> dict[str, Step]:
        """One forward and backward of each contestant."""
        functions = {"host": silu_attention_host, "grouped": silu_attention_eager}
        packed = {name: self._packed(function) for name, function in functions.items()}
        return packed | {name: self._padded(name) for name in BASELINES}

    def _packed(self, function: object) -> Step:
        leaves = leaves_of(self.query, self.key, self.value)
        starts = torch.tensor([0, *accumulate(self.lengths)])

        def step() -> object:
            layout = JaggedLayout.from_cu_seq_lens(starts, self.tokens)
            out = function(*leaves, layout, self.visibility, divisors=self.divisors)  # type: ignore[operator]
            return torch.autograd.grad(out, leaves, self.grad)

        return step

    def _padded(self, contestant: str) -> Step:
        """The mask [B, 1, longest, longest] is made beforehand."""
        pad = lambda x: torch.nn.utils.rnn.pad_sequence(list(x.split(self.lengths)), batch_first=True)  # noqa: E731
        query, key, value, grad = (
            pad(x).transpose(1, 2).contiguous() for x in (self.query, self.key, self.value, self.grad)
        )
        leaves = leaves_of(query, key, value)
        query, key, value = leaves
        seen = self.visibility.sees(pad(self.visibility.query_times), pad(self.visibility.key_times))
        inside = torch.arange(max(self.lengths)) < torch.tensor(self.lengths).unsqueeze(1)
        mask = ((seen & inside.unsqueeze(1)) | torch.eye(seen.shape[1], dtype=torch.bool)).unsqueeze(1)
        divisors = torch.tensor(self.lengths).view(-1, 1, 1, 1)

        def step() -> object:
            if contestant == "padded_eager":
                out = (F.silu(query @ key.mT) * mask) @ value / divisors
            else:
                out = F.scaled_dot_product_attention(query, key, value, mask, scale=1.0)
            return torch.autograd.grad(out, leaves, grad)

        return step


def masked_workload(histories: list[int], source: str, *, rounds: int) -> MaskedWorkload:
    """1 to 50 candidates for each user; two heads of 64."""
    candidates = np.random.default_rng(1).integers(1, 51, len(histories)).tolist()
    return MaskedWorkload("mtgr", histories, candidates, f"{source}, 1..50 candidates", 2, 64, rounds)
