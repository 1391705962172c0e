"""`RunAverage`: an average of the weights that the run keeps in another module.

The *run* is the training that is watched. It may keep a moving average of its weights, such as an
`AveragedModel` of torch, for evaluation. Each *twin*, a sample of the layers that is stored and
stepped as a recipe says, then keeps such an average of its own weights.

Read `micro_gradients` first; `batch_norm` comes next.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import FunctionType

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from altgrad._messages import check_type, few
from altgrad.measurement.catalogue import (
    FORMAT_METRICS,
    LAYER_METRICS,
    STATE_METRICS,
    TWIN_METRICS,
)
from altgrad.observation.parameter_names import parameter_names
from altgrad.recipes.recipe import Recipe
from altgrad.twins.generators import PrivateGenerators
from altgrad.twins.isolation import keeping_settings
from altgrad.twins.shared_objects import find_shared

_TAKEN = frozenset(
    {
        *("running_mean", "running_var", "step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
        *("exp_inf", "momentum_buffer", "square_avg", "grad_avg", "acc_delta", "sum", "prev"),
        *("step_size", "ax", "mu", "eta", "mu_product", "row_var", "col_var", "variance"),
    }
)
"""Names of states of BatchNorm and of the optimizers of torch, whose figures have these names."""
_KNOWN = frozenset({*LAYER_METRICS, *FORMAT_METRICS, *TWIN_METRICS})
"""Names of metrics that need no state."""


class RunAverage:
    """A module with an average of the weights of the training, and the way it is updated.

    An `AveragedModel` is updated by its own `multi_avg_fn` or `avg_fn`, or without both by the mean
    of all weights so far. Any other module moves by a share of the way to the weights, 1 − decay.

    Args:
        name: Name of the average, with which the names of its metrics begin.
        module: The module with the average.
        parameters: The parameters of the training, by name.
        decay: The decay, if the module is no `AveragedModel`. None to find it from the numbers of
            the average, which must then be float32 or float64.
        part: Path of the module whose weights are averaged, such as ``"net.q1"``; ``""`` for the
            whole model. None to find it from names and shapes.

    Attributes:
        name: The `name` argument.
        module: The `module` argument.
        decay: The `decay` argument.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: The names of the module's parameters are not those of the training, or its
            updates cannot be repeated on a sample.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        parameters: Mapping[str, Tensor],
        decay: float | None = None,
        part: str | None = None,
    ) -> None:
        check_type("name", name, str)
        if not name.replace("-", "_").isidentifier():
            raise ValueError(
                f"name={name!r}: expected letters, digits, '-' and '_', because log keys such as "
                "average_ratio/bf16 begin with the name; choose another one"
            )
        if name in _TAKEN or not _KNOWN.isdisjoint(key.format(state=name) for key in STATE_METRICS):
            raise ValueError(
                f"name={name!r}: expected a name that no state of an optimizer or of BatchNorm and "
                "no metric has; choose another one, such as 'ema'"
            )
        if not isinstance(module, nn.Module):
            raise TypeError(
                "averaged: expected a torch.nn.Module whose parameters are the average, got "
                f"{type(module).__name__}"
            )
        self.name = name
        self.module = module
        self.decay = decay
        self._generators = PrivateGenerators(0)
        self._prefix = _find_prefix(self._own_parameters(), parameters, part)
        if self.counter is None:
            self._check_decay()
        else:
            self._check_functions()

    @property
    def counter(self) -> Tensor | None:
        """The tensor that counts the updates of an `AveragedModel`; None for other modules."""
        return self.module.n_averaged if isinstance(self.module, AveragedModel) else None

    def find_tensors(self) -> Mapping[str, Tensor]:
        """Return the average of each layer of the training, by name of the layer."""
        return {f"{self._prefix}{name}": each for name, each in self._own_parameters().items()}

    def concerns(self, _: Recipe) -> bool:
        """Return True: the twin of any recipe keeps an average of its weights, too.

        A *recipe* says in which formats weights and states are stored. A *twin*, a sample of the
        layers, is stored and stepped so. Its weights, and so their average, differ from those of
        the training. A running statistic of BatchNorm concerns only some recipes.
        """
        return True

    def step(self, averages: Tensor, weights: Tensor, count: int) -> None:
        """Update averages of weights in place by the function with which the `AveragedModel` does.

        Args:
            averages: The averages, floating-point (elements).
            weights: The weights, floating-point (elements).
            count: Number of updates so far. The first one copies the weights.
        """
        if not count:
            averages.copy_(weights)
            return
        # On the host, so that a function that reads the number does not wait for a device.
        number = torch.tensor(count, dtype=torch.int64, device="cpu")
        if all(each is None or _is_torch(each) for each in (self._many, self._single)):
            self._call(averages, weights, number)
            return
        with keeping_settings(), self._generators.using([averages.device]):
            self._call(averages, weights, number)

    def _call(self, averages: Tensor, weights: Tensor, number: Tensor) -> None:
        if self._many is not None:
            self._many([averages], [weights], number)
        else:
            function = self._single or self._update_mean
            averages.copy_(function(averages, weights, number))

    def _update_mean(self, averages: Tensor, weights: Tensor, number: Tensor) -> Tensor:
        """Return a running mean after one more set of weights, as `AveragedModel` does by default.

        torch uses two formulas, by the device of the training's averages:
        torch/optim/swa_utils.py, AveragedModel.update_parameters.
        """
        real = next(iter(self._own_parameters().values()))
        if real.device.type in ("cpu", "mps"):
            return averages + (weights - averages) / (number + 1)
        return averages.lerp(weights, float(1 / (number + 1)))

    @property
    def _many(self) -> Callable[..., object] | None:
        return getattr(self.module, "multi_avg_fn", None)

    @property
    def _single(self) -> Callable[..., Tensor] | None:
        return getattr(self.module, "avg_fn", None)

    def _own_parameters(self) -> dict[str, Tensor]:
        """Return the floating-point parameters of the average by their names in its module."""
        module = self.module
        inner = module.module if isinstance(module, AveragedModel) else module
        named = parameter_names(inner).items()
        return {name: each for each, name in named if each.is_floating_point()}

    def _check_functions(self) -> None:
        """Check that the `AveragedModel`'s `multi_avg_fn` or `avg_fn` keeps nothing between calls.

        AltGrad calls it for small samples of the weights, too. If it counted its calls, say, these
        would change what it does in the training.

        Raises:
            ValueError: A function keeps something between calls.
        """
        for function in (self._many, self._single):
            is_plain = function is None or isinstance(function, FunctionType)
            shared = find_shared((function,)) if is_plain else f"a {type(function).__name__}"
            if shared:
                raise ValueError(
                    f"averaged={type(self.module).__name__}: expected a multi_avg_fn or avg_fn "
                    f"that keeps nothing between calls, and it has {shared}; write a function that "
                    "computes the decay from its third argument, num_averaged"
                )

    def _check_decay(self) -> None:
        """Check the decay of an average that is no `AveragedModel`, and so has no update function.

        If no decay is given, it is found from how far the average moves, which needs float32 or
        float64. Numbers of 16 bits have too few digits: most move by other shares than 1 − decay.

        Raises:
            ValueError: The decay is out of range, or cannot be found.
        """
        if self.decay is not None:
            if not 0 <= self.decay <= 1:
                raise ValueError(f"decay={self.decay}: expected a number from 0 to 1")
            return
        dtypes = {each.dtype for each in self._own_parameters().values()}
        if low := sorted(str(each) for each in dtypes if each.itemsize < torch.float32.itemsize):
            raise ValueError(
                f"averaged={type(self.module).__name__} has numbers of dtype {few(low)}: expected "
                "float32 or float64, from which the decay can be found; pass decay="
            )


def _find_prefix(
    own: Mapping[str, Tensor], parameters: Mapping[str, Tensor], part: str | None
) -> str:
    """Return the prefix of the training's names that the names of an average lack.

    An average of the submodule ``net`` has the name ``0.weight`` for the layer ``net.0.weight``:
    its prefix is ``"net."``. It is empty for an average of the whole model. Parameters of the
    average itself, which may be a part of the model, do not count.

    Args:
        own: The parameters of the average, by name.
        parameters: The parameters of the training, by name.
        part: Path of the module, the only place that is looked at; None to look everywhere.

    Raises:
        ValueError: No place in the training has these names, or several have.
    """
    averages = {*own.values()}
    shapes = {name: each.shape for name, each in parameters.items() if each not in averages}
    first = next(iter(own), "")
    ends = (name for name in shapes if name == first or name.endswith(f".{first}"))
    prefixes = [name.removesuffix(first) for name in ends]
    found = [
        prefix
        for prefix in prefixes
        if all(shapes.get(f"{prefix}{name}") == each.shape for name, each in own.items())
    ]
    if part is not None:
        found = [prefix for prefix in found if prefix == (f"{part}." if part else "")]
    if own and "" in found:
        return ""
    if not own or len(found) != 1:
        what = few(found) if found else "none"
        raise ValueError(
            f"averaged: expected a module whose parameters have the names and shapes of those of "
            f"one module of the training, and {what} fits {few([*own])}; pass a copy of the module "
            "that is trained, and its path as part= where several fit"
        )
    return found[0]


def _is_torch(function: Callable[..., object]) -> bool:
    return str(getattr(function, "__module__", "")).startswith("torch.")
