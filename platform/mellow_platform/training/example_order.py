"""Order of training examples in an epoch: computed from (seed, epoch), never remembered from a stream."""

from collections.abc import Callable

import numpy as np

# Orders that this process computed last: an object from the object store is another one in every task.
_ORDERS: dict[tuple[str, int, int], np.ndarray] = {}
CACHED_ORDERS = 4


def random_generator(seed: int, epoch: int, purpose: str) -> np.random.Generator:
    """Return the random generator of one purpose in an epoch."""
    return np.random.default_rng([seed, epoch, *purpose.encode()])


def cached(key: tuple[str, int, int], compute: Callable[[], np.ndarray]) -> np.ndarray:
    """Return the order of `key` (examples, seed, epoch), computed once per process as long as it is recent."""
    if key not in _ORDERS:
        while len(_ORDERS) >= CACHED_ORDERS:
            del _ORDERS[next(iter(_ORDERS))]
        _ORDERS[key] = compute()
    return _ORDERS[key]


def epoch_order(
    count: int, pairs_of: Callable[[np.ndarray], np.ndarray], questions_per_pack: int, seed: int, epoch: int
) -> np.ndarray:
    """Return every example [count] once: packs in random order, whose examples share a pair of clips.

    Args:
        pairs_of: returns the pairs of clips [numbers, 2] of examples.
        questions_per_pack: most examples per pack; 1 orders all examples at random.
    """
    draws = random_generator(seed, epoch, "order")
    order = draws.permutation(count)
    if questions_per_pack == 1:
        return order
    pairs = pairs_of(order)
    codes = pairs[:, 0] * (pairs.max() + 1) + pairs[:, 1]
    by_pair = np.argsort(codes, kind="stable")
    codes = codes[by_pair]
    starts = np.append(True, codes[1:] != codes[:-1])
    places = np.arange(len(codes))
    within = places - np.maximum.accumulate(np.where(starts, places, 0))
    packs = np.cumsum(within % questions_per_pack == 0) - 1
    ranks = draws.permutation(packs[-1] + 1)
    return order[by_pair[np.argsort(ranks[packs], kind="stable")]]
