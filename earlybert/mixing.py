"""Samples of several sources in fixed shares, each source at its own pace.

A source with a larger share than its size comes to its second epoch sooner than the others; none is cut.
Blocks of 4,096 positions hold the same number of samples of each source in an order that the seed chooses,
so which sample stands at a position stays arithmetic, and the position stays the loader's whole state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from earlybert.config import SettingsError
from earlybert.order import key_of, permute

BLOCK = 4096
"""Positions; shares are rounded to multiples of one over this."""


class Mixture:
    """Which sample of which source stands at a position of the run.

    `counts`: samples of each source in an epoch of its own. A sample's id is its number in its source plus
    the counts of the sources before it.
    """

    def __init__(
        self, counts: Mapping[str, int], shares: Mapping[str, float], *, key: Sequence[int | str]
    ) -> None:
        self.names = list(counts)
        self._counts = np.array([counts[name] for name in self.names], dtype=np.int64)
        self._firsts = np.concatenate([[0], np.cumsum(self._counts)[:-1]])
        self._key = tuple(key)
        self.in_block = _in_block([shares[name] for name in self.names], self.names)
        """Samples of each source in a block, int64 [sources]."""
        in_order = np.repeat(np.arange(len(self.names)), self.in_block)
        self._source = in_order[permute(np.arange(BLOCK), length=BLOCK, key=key_of("mixture", *self._key))]
        self._before = np.empty(BLOCK, dtype=np.int64)
        for source in range(len(self.names)):
            here = self._source == source
            self._before[here] = np.arange(int(here.sum()))

    def ids(self, consumed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(sample ids, epochs of their sources) of positions counted from the start of the run."""
        blocks, slots = np.divmod(np.asarray(consumed, dtype=np.int64), BLOCK)
        sources = self._source[slots]
        epochs, places = np.divmod(
            blocks * self.in_block[sources] + self._before[slots], self._counts[sources]
        )
        ids = np.empty_like(places)
        for source, epoch in np.unique(np.stack([sources, epochs]), axis=1).T.tolist():
            here = (sources == source) & (epochs == epoch)
            key = key_of("order", *self._key, self.names[source], epoch)
            order = permute(places[here], length=int(self._counts[source]), key=key)
            ids[here] = order + self._firsts[source]
        return ids, epochs

    def source_of(self, sample: int) -> tuple[int, int]:
        """(which source, the sample's number in it)."""
        source = int(self._firsts.searchsorted(sample, side="right")) - 1
        return source, sample - int(self._firsts[source])


def check(weights: Mapping[str, float], *, sources: Sequence[str]) -> None:
    """Raise SettingsError unless there is a weight for each of a corpus' sources and nothing else."""
    for name in weights:
        if name not in sources:
            raise SettingsError(
                f"weights.{name}: the corpus has no source {name!r}; its sources: {', '.join(sources)}"
            )
    if missing := [name for name in sources if name not in weights]:
        raise SettingsError(
            f"weights: nothing is said of {', '.join(missing)}; give each source of the corpus a weight "
            "(0 leaves it out)"
        )


def _in_block(shares: Sequence[float], names: Sequence[str]) -> np.ndarray:
    """Whole numbers in the proportions of the shares that add up to BLOCK (largest remainders)."""
    exact = np.array(shares, dtype=np.float64) / sum(shares) * BLOCK
    counts = np.floor(exact).astype(np.int64)
    for source in np.argsort(-(exact - counts), kind="stable")[: BLOCK - int(counts.sum())]:
        counts[source] += 1
    if not counts.all():
        name = names[int(np.flatnonzero(counts == 0)[0])]
        raise SettingsError(f"weights.{name} is less than one in {BLOCK:,} of all; raise it, or make it 0")
    return counts
