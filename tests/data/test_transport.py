"""Arrays arrive as they were sent, and a block is not written again while it may be in use."""

import numpy as np
import torch
from grzoo.data.transport import BlockRing, Receiver
from hypothesis import given
from hypothesis import strategies as st

ARRAYS = st.lists(st.tuples(st.sampled_from(["int64", "int8", "float32", "bool"]), st.integers(0, 40)), max_size=5)


@given(st.lists(ARRAYS, max_size=6), st.integers(1, 3))
def test_arrays_arrive_as_sent(steps: list[list[tuple[str, int]]], slots: int) -> None:
    ring, receiver = BlockRing(slots), Receiver()
    for number, step in enumerate(steps):
        sent = {f"{i}": (np.arange(n) * 37 + number + i).astype(dtype) for i, (dtype, n) in enumerate(step)}
        sent["matrix"] = np.arange(6, dtype=np.int64).reshape(1, 6) - number
        arrived = receiver.unpack(ring.pack(sent))
        assert list(arrived) == list(sent)
        for name, values in sent.items():
            assert arrived[name].dtype == values.dtype and np.array_equal(arrived[name], values)


def test_blocks_are_reused_after_a_round_and_travel_once() -> None:
    ring, receiver = BlockRing(3), Receiver()
    parcels = [ring.pack({"x": np.full(100, i)}) for i in range(5)]
    assert [parcel.slot for parcel in parcels] == [0, 1, 2, 0, 1]
    assert [parcel.block is not None for parcel in parcels] == [True, True, True, False, False]
    values = [int(receiver.unpack(parcel)["x"][0]) for parcel in parcels]
    assert values == [3, 4, 2, 3, 4], "the blocks of steps 0 and 1 were written again by 3 and 4"


def test_a_block_grows_with_its_step() -> None:
    ring, receiver = BlockRing(1), Receiver()
    for size in (10, 12, 1000, 5):
        arrived = receiver.unpack(ring.pack({"x": np.arange(size)}))
        assert arrived["x"].tolist() == list(range(size))
    block = ring.pack({"x": np.arange(4000)}).block
    assert isinstance(block, torch.Tensor) and block.is_shared()
