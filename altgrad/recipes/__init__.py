"""Recipes: how weights and optimizer states are stored and stepped.

Each file names the one to read before it and the one to read next:

1. Storing for real: `native_storage`, `rounding`, `rounding_generators`, `stored_states`,
   `storage`.
2. Recipes: `packed_states`, `optimizer_maker`, `recipe`, `libraries_8bit`, `libraries`, `names`.

`altgrad.twins` tries recipes on a sample of a training. Names are imported on first use. Read
`altgrad.quantization` first.
"""

from typing import TYPE_CHECKING

from altgrad import _lazy

if TYPE_CHECKING:
    from altgrad.recipes.names import find_default_recipes, get_recipes
    from altgrad.recipes.optimizer_maker import OptimizerMaker
    from altgrad.recipes.packed_states import PackedStates, StateParts
    from altgrad.recipes.recipe import Recipe
    from altgrad.recipes.storage import WeightStorage

__all__ = [
    "OptimizerMaker",
    "PackedStates",
    "Recipe",
    "StateParts",
    "WeightStorage",
    "find_default_recipes",
    "get_recipes",
]

if not TYPE_CHECKING:  # a `__getattr__` would make every name Any for mypy
    __getattr__, __dir__ = _lazy.attach(
        __name__,
        {
            "names": "find_default_recipes get_recipes",
            "optimizer_maker": "OptimizerMaker",
            "packed_states": "PackedStates StateParts",
            "recipe": "Recipe",
            "storage": "WeightStorage",
        },
        submodules="libraries libraries_8bit names optimizer_maker packed_states recipe rounding "
        "rounding_generators storage stored_states",
    )
