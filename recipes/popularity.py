"""The baseline that a recommender must beat: everybody gets the items with the most training events."""

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]


class PopularityRanking:
    """One order of the catalogue for everybody: training events descending, ties by ascending item id.

    Args:
        item_ids: int64 [N], distinct ids of the catalogue.
        counts: int64 [N], training events of each.
    """

    def __init__(self, item_ids: Int64, counts: Int64) -> None:
        order = np.lexsort((item_ids, -counts))
        self.ranking: Int64 = item_ids[order]
        self._by_id = np.argsort(self.ranking, kind="stable")
        self._sorted_ids = self.ranking[self._by_id]

    def positions(self, ids: Int64) -> Int64:
        """int64 [n]: place of each id in the order, from 0; ids outside the catalogue stand behind it (N)."""
        if not len(self.ranking):
            return np.zeros(len(ids), np.int64)
        slot = np.minimum(np.searchsorted(self._sorted_ids, ids), len(self.ranking) - 1)
        return np.where(self._sorted_ids[slot] == ids, self._by_id[slot], len(self.ranking))

    def ranks(self, targets: Int64, seen: Int64, offsets: Int64) -> Int64:
        """Rank of each user's target, from 1, when the user's seen items are left out of the ranking.

        Args:
            targets: int64 [U].
            seen: int64 [S], items of all users' histories, user after user; repeats and the target itself do no harm.
            offsets: int64 [U + 1], where each user's part of `seen` starts; all zeros: nothing is left out.

        Returns:
            int64 [U].
        """
        position = self.positions(targets)
        user = np.repeat(np.arange(len(targets)), np.diff(offsets))
        ahead = self.positions(seen) < position[user]
        pairs = np.unique(np.stack([user[ahead], seen[ahead]], axis=1), axis=0)
        return position + 1 - np.bincount(pairs[:, 0], minlength=len(targets))
