"""Recipes, and the twins that try them on a sample of a training.

A *recipe* says how weights and optimizer states are stored and stepped. A *twin* is a recipe at
work: it steps a small sample of each layer as the recipe says, with the gradients of the *run*, the
training that is watched. Each file names the one to read before it and the one to read next:

1. Storing for real: `rounding`, `rounding_generators`, `stored_states`, `storage`.
2. Recipes: `recipe`, `names`.
3. A sample and its numbers: `layout`, `sample`, `twin_tensors`, `element_scales`, `twin`,
    `self_check`.
4. The optimizer of a twin: `shared_objects`, `optimizer_copy`, `writes`, `hyperparameters`,
    `generators`, `isolation`, `factory`, `flat_state`, `optimizer_twin`.
5. What the run does: `twin_source`, `layer_plan`, `lane_sorter`, `run_weights`, `run_states`,
    `fused_sgd`.
6. All twins: `lane`, `twin_state`, `twins`.

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
