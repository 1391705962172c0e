"""Constants of binary64, the format of float64, with which grids are computed without logarithms.

A float64 is a sign, an exponent that is stored plus 1023, and a mantissa::

    s eeeeeeeeeee m…m   (1, 11 and 52 bits)

This file imports nothing, so that the compiler of the native kernel starts without torch. `grids`
comes next, and uses these numbers for tensors.
https://en.wikipedia.org/wiki/Double-precision_floating-point_format
"""

MANTISSA_BITS, BIAS = 52, 1023
EXPONENT_MASK = 0x7FF0_0000_0000_0000
"""The 11 exponent bits; a magnitude with all other bits 0 is the power of two below it."""
LARGEST = 2.0**960
"""The largest magnitude to round: above it, the sums with `ROUNDER` would overflow float64. float32
ends at 2**128."""
ROUNDER = 1.5 * 2.0**52
"""Number of spacings in the number that, added and subtracted again, rounds to a spacing.

The sum x + ROUNDER · spacing has a unit in the last place of spacing. Thus the addition rounds x to
a multiple of spacing, with ties to even, and subtracting ROUNDER · spacing gives that multiple
exactly. Spacing is a power of two, so the products are exact. The factor 1.5 keeps the sum in one
binade for negative x, too. T. J. Dekker, "A floating-point technique for extending the available
precision", Numerische Mathematik 18 (1971).
"""
JUST_BELOW_ONE = 1 - 2.0**-53
"""The largest float64 below 1. Multiplied by this, a power of two falls just below itself, and any
other float64 stays between the same two powers of two."""
