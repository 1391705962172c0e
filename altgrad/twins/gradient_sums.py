"""`GradientSums`: add up sampled gradients of several backward passes, as recipes say.

In gradient accumulation, several backward passes come before a step. Each adds its gradient, called
a *micro-gradient* here, to `parameter.grad`. A sum that is kept in few bits is rounded after each
addition. A *twin*, which steps a sample of the layers as a recipe says, therefore needs sums of its
own. They are kept here, beside the sum that the training itself has at the same elements.

The training changes its sum before the step: it divides by a loss scale, clips, or averages over
ranks. `follow_changes` does the same to the sum of a twin.

Read `sampled_gradients` first; `micro_gradients` comes next, and calls both.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from altgrad.recipes.recipe import Recipe
from altgrad.recipes.rounding import store_
from altgrad.recipes.rounding_generators import RoundingGenerators
from altgrad.twins.run_weights import RunWeights


class GradientSums:
    """The sums of sampled gradients over backward passes: the training's, and one for each recipe.

    The gradient of a single backward pass is a *micro-gradient*. The caller writes it into `micro`,
    and what the training's sum was before into `before`, and then calls `add`. All tensors have the
    samples of the layers one after another, and one element more, which stays 0.

    Args:
        recipes: The recipes with `accumulate`, the format to which a sum is rounded after each
            addition.
        generators: The random numbers of stochastic rounding, by name of the recipe.
        sizes: Number of sampled elements of each layer.
        dtype: The dtype of the training's gradients.
        device: The device of the training's gradients.

    Attributes:
        places: The slice of the tensors that each layer has.
        micro: The micro-gradients to add next, floating-point (elements).
        before: What the training's sum was before these were added, floating-point (elements).
        total: The training's sum, as its own additions round it, floating-point (elements).
        sums: The sum of each recipe by its name, on the grid of its format, float32 or float64
            (elements).
    """

    def __init__(
        self,
        recipes: Sequence[Recipe],
        generators: Mapping[str, RoundingGenerators],
        sizes: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._recipes = tuple(recipes)
        self._generators = generators
        ends = [*itertools.accumulate(sizes, initial=0)]
        self.places = [slice(*each) for each in itertools.pairwise(ends)]
        self.micro = torch.zeros(ends[-1] + 1, dtype=dtype, device=device)
        self.before, self.total = torch.zeros_like(self.micro), torch.zeros_like(self.micro)
        finer = torch.promote_types(dtype, torch.float32)
        # The elements of each layer, with the last one as padding, and the layer of each element.
        width = max(sizes, default=0)
        rows = torch.full((len(sizes), width), ends[-1], dtype=torch.int64, device="cpu")
        owners = torch.zeros(ends[-1] + 1, dtype=torch.int64, device="cpu")
        for number, place in enumerate(self.places):
            rows[number, : sizes[number]] = torch.arange(place.start, place.stop, device="cpu")
            owners[place] = number
        self._rows, self._owners = rows.to(device), owners.to(device)
        self.sums = {r.name: torch.zeros_like(self.micro, dtype=finer) for r in recipes}

    def add(self) -> None:
        """Add the gradients of one backward pass, `micro`, to the sums of the training and recipes.

        A *recipe* says how weights and optimizer states are stored.

        A recipe with `accumulate` says to which format its sum is rounded after each addition. The
        caller has set `before` to what `parameter.grad` was before this backward pass. It is 0
        afterwards.

        The sum of a recipe begins anew in a layer where `before` is 0, as after `zero_grad`. Where
        `before` is not the training's sum so far, something else has written to the gradients: the
        sum goes on from `before`.
        """
        begins = (self.before[self._rows] == 0).all(dim=1)[self._owners]
        goes_on = (self.before == self.total) & ~begins
        for recipe in self._recipes:
            own = self.sums[recipe.name]
            own.copy_(torch.where(goes_on, own, self.before.to(own.dtype)))
            own.add_(self.micro)
            self.round_as(recipe, own)
        torch.add(self.before, self.micro, out=self.total)
        self.before.zero_()

    def round_as(self, recipe: Recipe, numbers: Tensor) -> None:
        """Round numbers in place as a recipe rounds sums of gradients.

        A *recipe* says how weights and optimizer states are stored.

        Args:
            recipe: One of the recipes.
            numbers: The numbers, float32 or float64, any shape.
        """
        format = recipe.sum_format
        assert format is not None
        if not format.is_coarser_than(numbers.dtype):
            return  # their dtype has rounded them
        generator = None
        if recipe.rounding == "stochastic":
            generator = self._generators[recipe.name].get(numbers.device)
        store_(numbers, format.element, None, rounding=recipe.rounding, generator=generator)

    def nbytes(self) -> int:
        """Return the memory of all sums in bytes."""
        indices = self._rows.nbytes + self._owners.nbytes
        return 3 * self.micro.nbytes + indices + sum(each.nbytes for each in self.sums.values())


def follow_changes(
    sums: Mapping[str, Tensor], total: Tensor, applied: Tensor, places: RunWeights
) -> dict[str, Tensor]:
    """Change other sums of gradients as the training has changed its own before a step.

    In each layer, the applied gradients are split into factor · total + rest, with the factor of
    least squares. Each sum then becomes factor · sum + rest. Unscaling and clipping by norm change
    the factor alone, and leave no rest. Where the training changed nothing, the factor is exactly 1
    and the rest is 0.

    Args:
        sums: Sums of the same gradients that were rounded in other ways, by name, float32 or
            float64 (elements).
        total: The sum of the training after its last backward pass, floating-point (elements).
        applied: The gradients that the training is about to apply, floating-point (elements).
        places: An object that says by `rows`, `mask` and `layer_rows` where the elements of each
            layer are.

    Returns:
        The changed sums by name, (elements). An element whose applied gradient is infinite or NaN
        has the applied gradient.
    """
    # A product that the training rounds may differ by this share from the product here.
    noise = torch.finfo(applied.dtype).eps
    wide = next(iter(sums.values())).dtype
    total, applied = total.to(wide), applied.to(wide)
    fitted = _fit_factors(total[places.rows], applied[places.rows], places.mask)
    factors = fitted.to(wide)[places.layer_rows]
    rest = applied - factors * total
    rest = torch.where(rest.abs() <= noise * applied.abs(), 0.0, rest)
    known = rest.isfinite()
    return {name: torch.where(known, factors * own + rest, applied) for name, own in sums.items()}


def _fit_factors(total: Tensor, applied: Tensor, mask: Tensor) -> Tensor:
    """Return by which factor the applied gradients of each layer differ from the training's sum.

    It is found by least squares over all elements, so that their rounding errors average out. In
    float32 it mostly equals the number by which the training has multiplied its sum.

    Args:
        total: The sum, a row for each layer, floating-point (layers, width).
        applied: The applied gradients, floating-point (layers, width).
        mask: bool (layers, width), False where a row has no element of its layer.

    Returns:
        float64 (layers); 1 for layers whose sum is 0.
    """
    total, applied = total.double(), applied.double()
    known = mask & total.isfinite() & applied.isfinite()
    total, applied = torch.where(known, total, 0.0), torch.where(known, applied, 0.0)
    size = total.square().sum(dim=1)
    factors = (total * applied).sum(dim=1) / size
    return torch.where(size > 0, factors, 1.0)
