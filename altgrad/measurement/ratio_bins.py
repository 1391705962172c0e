"""`count_ratios`: ratios of optimizer states in bins, which several ranks add up to one median.

A median over the elements of all ranks does not follow from the medians of each. Ratios are
therefore counted in 131 bins, whose counts add up. A ratio of exactly 0 or 1 has a bin of its own,
so that a state that is stored as the run stores it has the median 1. Other bins are 1/16 octave
wide around 1, 1/4 octave around 16 and 1/16, and an octave around 4096. Several counts are packed
into one float64, since few elements are counted.

Read `twin_sums` first, which computes the ratios; `twin_parts` comes next.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from altgrad.measurement.numbers import Numbers

_PER_OCTAVE = 16
"""Number of bins in an octave around 1."""

_REACH = 4
"""Distance from 1, in octaves, at which bins are four times as wide as around 1.

With t octaves from 1, the place t / (1 + |t| / 4) lies between −4 and 4 for every ratio.
"""

_HALF = _PER_OCTAVE * _REACH  # bins on either side of 1
_NEGATIVE, _ZERO, _ONE = 0, 1, 2 + _HALF
_BINS = 3 + 2 * _HALF
_LARGEST = 2.0**53  # up to which float64 holds each integer


def count_numbers(most: int) -> int:
    """Return how many float64 numbers hold the counts of all bins of one state.

    Args:
        most: Largest number of ratios that are counted on all ranks together.
    """
    return -(-_BINS // _count_digits(most))


def count_ratios(ratios: Tensor, most: int) -> Tensor:
    """Count ratios in bins along the last dimension, packed into few numbers that can be added.

    The sum of the results of several ranks is the result for the ratios of all.

    Args:
        ratios: Ratios, float64 (…, elements). NaN is not counted.
        most: Largest number of ratios that are counted on all ranks together. Sums of results with
            more are wrong.

    Returns:
        float64 (…, numbers) with the length that `count_numbers` returns, on the device of the
        ratios.
    """
    digits, codes = _count_digits(most), _find_bins(ratios)
    packed = ratios.new_zeros((*ratios.shape[:-1], count_numbers(most)))
    # Each count is a digit of a number: that of bin k is digit k % digits of number k // digits.
    units = float(most + 1) ** torch.arange(digits, device=ratios.device, dtype=torch.float64)
    ones = torch.where(ratios.isnan(), 0.0, units[codes % digits])
    return packed.scatter_add_(-1, codes // digits, ones)


def find_medians(packed: Numbers, most: int) -> Numbers:
    """Return the medians of ratios that were counted in bins; of two in the middle, the lower.

    Args:
        packed: Sums of results of `count_ratios`, float64 (…, numbers).
        most: The argument of `count_ratios`.

    Returns:
        The middle of the bin that has the median, float64 (…): 0 and 1 are exact. NaN without
        ratios, and for negative medians.
    """
    digits = _count_digits(most)
    integers = np.rint(packed).astype(np.int64)[..., None]
    units = (most + 1) ** np.arange(digits, dtype=np.int64)
    shape = (*packed.shape[:-1], packed.shape[-1] * digits)
    counts = (integers // units % (most + 1)).reshape(shape)[..., :_BINS]
    total = counts.sum(-1, keepdims=True)
    places = (counts.cumsum(-1) > (total - 1) // 2).argmax(-1)
    medians: Numbers = np.where(total[..., 0] > 0, _list_middles()[places], np.nan)
    return medians


@lru_cache(maxsize=8)
def _count_digits(most: int) -> int:
    """Return how many counts from 0 to `most` fit into a float64 without rounding."""
    digits = 1
    while (most + 1) ** (digits + 1) <= _LARGEST:
        digits += 1
    return digits


def _find_bins(ratios: Tensor) -> Tensor:
    """Return the bin of each ratio, int64 in the same shape; any bin for NaN."""
    # Where the place is 0, the ratio is 1, or so near that only rounding tells them apart.
    octaves = ratios.abs().log2().clamp(-1100, 1100).nan_to_num(0.0)
    place = octaves / (1 + octaves.abs() / _REACH) * _PER_OCTAVE
    side = place.floor().clamp(-_HALF, _HALF - 1).long()
    above = (ratios > 1).long()  # the bins above 1 come after that of 1 itself
    bins = 2 + _HALF + torch.where(ratios > 1, side.clamp(min=0), side.clamp(max=-1)) + above
    bins = torch.where(ratios == 1, _ONE, bins)
    bins = torch.where(ratios == 0, _ZERO, bins)
    return torch.where(ratios < 0, _NEGATIVE, bins)


@lru_cache(maxsize=1)
def _list_middles() -> Numbers:
    """Return the ratio in the middle of each bin, float64 (bins)."""
    place = (np.arange(-_HALF, _HALF) + 0.5) / _PER_OCTAVE
    middles = np.exp2(place / (1 - np.abs(place) / _REACH))
    return np.concatenate(([np.nan, 0.0], middles[:_HALF], [1.0], middles[_HALF:]))
