"""`OutputSettings`: the name under which pickles of version 0.1.0 find this class.

The class is in `altgrad.output` now. `pickles` reads such pickles.
"""

from altgrad.output import OutputSettings

__all__ = ["OutputSettings"]
