"""Order of training examples in an epoch, computed from (seed, epoch)."""

from collections.abc import Callable

import numpy as np

# Latest orders of this process. Examples cannot cache them: Ray gives each task a new object from the object store.
_ORDERS: dict[tuple[str, int, int], np.ndarray] = {}
CACHED_ORDERS = 4


def random_generator(seed: int, epoch: int, purpose: str) -> np.random.Generator:
    """Return the random generator for one purpose in an epoch."""
    return np.random.default_rng([seed, epoch, *purpose.encode()])


def cached(key: tuple[str, int, int], compute: Callable[[], np.ndarray]) -> np.ndarray:
    """Return the order of `key` (examples, seed, epoch); the latest `CACHED_ORDERS` are computed once per process."""
    if key not in _ORDERS:
        while len(_ORDERS) >= CACHED_ORDERS:
            del _ORDERS[next(iter(_ORDERS))]
        _ORDERS[key] = compute()
    return _ORDERS[key]


def epoch_order(
    count: int, pairs_of: Callable[[np.ndarray], np.ndarray], questions_per_pack: int, seed: int, epoch: int
) -> np.ndarray:
    """Return the order [count] of an epoch: each example once, in packs of examples on the same clips, shuffled.

    Args:
        pairs_of: returns the clip pairs [numbers, 2] of examples.
        questions_per_pack: most examples per pack; 1 orders all examples at random.
    """
    generator = random_generator(seed, epoch, "order")
    order = generator.permutation(count)
    if questions_per_pack == 1:
        return order
    pairs = pairs_of(order)
    codes = pairs[:, 0] * (pairs.max() + 1) + pairs[:, 1]
    by_pair = np.argsort(codes, kind="stable")
    codes = codes[by_pair]
    starts = np.append(True, codes[1:] != codes[:-1])
    positions = np.arange(len(codes))
    within_pair = positions - np.maximum.accumulate(np.where(starts, positions, 0))
    packs = np.cumsum(within_pair % questions_per_pack == 0) - 1
    ranks = generator.permutation(packs[-1] + 1)
    return order[by_pair[np.argsort(ranks[packs], kind="stable")]]
