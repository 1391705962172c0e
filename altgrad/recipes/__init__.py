"""Recipes: how weights and optimizer states are stored and stepped.

1. `rounding` stores a tensor in a format, with random numbers from `rounding_generators`.
2. `stored_states` stores the states of a layer, and `storage` the weights and states of a real
    optimizer: `WeightStorage`.
3. `recipe` describes how a run stores and steps; `names` has the common recipes by short names.

Names are imported on first use. Read `altgrad.quantization` first.
"""

from typing import TYPE_CHECKING

from altgrad import _lazy

if TYPE_CHECKING:
    from altgrad.recipes.names import find_default_recipes, get_recipes
    from altgrad.recipes.recipe import Recipe
    from altgrad.recipes.storage import WeightStorage

__all__ = ["Recipe", "WeightStorage", "find_default_recipes", "get_recipes"]

if not TYPE_CHECKING:  # a `__getattr__` would make every name Any for mypy
    __getattr__, __dir__ = _lazy.attach(
        __name__,
        {
            "names": "find_default_recipes get_recipes",
            "recipe": "Recipe",
            "storage": "WeightStorage",
        },
        submodules="names recipe rounding rounding_generators storage stored_states",
    )
