"""Which token of a sample sees which: one rule for causal, target-aware and dynamic (by time) masks."""

from dataclasses import dataclass

from torch import Tensor

ALWAYS = -(1 << 62)  # key time of a token that every token sees
STATIC = ALWAYS + 1  # query time of a token that sees only those
NEVER = 1 << 62  # key time of a token that no other token sees


@dataclass
class Visibility:
    """Token i sees token j of its own sequence if `key_times[j] < query_times[i]`; every token sees itself.

    Attributes:
        query_times: int64 [T], when token i looks.
        key_times: int64 [T], when token j can be seen: later than this. `ALWAYS`, `NEVER` and `STATIC` are the limits.
        max_distance: for keys of other times than `ALWAYS` also `query_times[i] - key_times[j] <= max_distance`.

    Causal attention has the position for both times; candidates have key time `NEVER`, so that they do not see each
    other; an event that a candidate sees only if it was earlier has its time for both.
    """

    query_times: Tensor
    key_times: Tensor
    max_distance: int | None = None

    def sees(self, query_times: Tensor, key_times: Tensor) -> Tensor:
        """bool [..., R, C] for times int64 [..., R] of queries and [..., C] of keys."""
        q, k = query_times.unsqueeze(-1), key_times.unsqueeze(-2)
        visible = k < q
        if self.max_distance is not None:
            visible &= (q - k <= self.max_distance) | (k == ALWAYS)
        return visible

    def only_itself(self) -> Tensor:
        """bool [T]: the rule of times hides the token from itself, so that seeing itself comes on top."""
        hidden = self.key_times >= self.query_times
        if self.max_distance is not None:
            far = self.query_times - self.key_times > self.max_distance
            hidden |= far & (self.key_times != ALWAYS)
        return hidden
