"""`FactoryGroup`: the optimizer that a user's function makes for one parameter group of the run.

A twin steps a sample of the *run*, the training that is watched. Its recipe may have a function
that makes its optimizer, the *factory*. The factory chooses hyperparameters, and may compute them
from those of the run, such as a tenth of the learning rate. When those of the run change, it is
called again; hyperparameters that it now chooses otherwise are set in the twin's optimizer. This is
exact for every factory.

Read `isolation` first; `flat_state` comes next.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from altgrad._messages import format_count
from altgrad.recipes.optimizer_maker import OptimizerFactory
from altgrad.twins.generators import PrivateGenerators
from altgrad.twins.hyperparameters import copy_options, is_equal, set_option
from altgrad.twins.isolation import keeping_settings, step_quietly


class FactoryGroup:
    """The optimizer that a factory makes for one parameter group of the training.

    A *factory* is a function of the user that makes an optimizer. The optimizer steps a *twin*, a
    sample of the training's weights.

    Args:
        factory: A function that is called with the parameters, and a dict of hyperparameters
            without ``"params"``. It returns an optimizer of these parameters.
        parameters: The parameters of the twin that the optimizer is to step.
        options: The hyperparameters of the training's group by key, such as ``lr``.
        seed: Seed of the random numbers that the factory draws. Every call draws the same ones.

    Attributes:
        optimizer: The optimizer that steps the twin.

    Raises:
        TypeError: The factory returned something other than an optimizer.
        ValueError: The optimizer that the factory returned has other parameters.
    """

    def __init__(
        self,
        factory: OptimizerFactory,
        parameters: Sequence[nn.Parameter],
        options: Mapping[str, Any],
        seed: int,
    ) -> None:
        self._factory = factory
        self._parameters = [*parameters]
        self._options = dict(options)
        self._seed = seed
        self.optimizer = self._make(self._parameters)
        self._chosen = self._list_options(self.optimizer)

    def compile(self) -> None:
        """Have the optimizer compile its step, by one step of copies with gradients of 0.

        Libraries keep what they have compiled for the shapes of the parameters. Warnings of the
        compiler are left out, since the training does not compile.
        """
        copies = [nn.Parameter(each.detach().clone()) for each in self._parameters]
        again = self._make(copies)
        for each in copies:
            each.grad = torch.zeros_like(each)
        devices = [*{each.device for each in copies}]
        with warnings.catch_warnings(), PrivateGenerators(self._seed).using(devices):
            warnings.simplefilter("ignore")
            step_quietly(again)

    def follow(self, changes: Mapping[str, Any]) -> None:
        """Call the factory, which makes the optimizer, again with changed hyperparameters.

        Hyperparameters that it chooses otherwise than in the call before are set in `optimizer`.

        Args:
            changes: The new hyperparameters of the training's group by key.
        """
        self._options |= changes
        # New parameters with the same memory, because some libraries register the parameters of
        # each optimizer that is made.
        again = self._make([nn.Parameter(each.detach()) for each in self._parameters])
        chosen = self._list_options(again)
        groups = zip(self.optimizer.param_groups, self._chosen, chosen, strict=True)
        for group, before, now in groups:
            for key in _find_differences(before, now):
                set_option(group, key, now[key])
        self._chosen = chosen

    def state_dict(self) -> dict[str, Any]:
        """Return the hyperparameters of `optimizer` now, and those that the factory last chose.

        Returns:
            Copies under ``options`` (now) and ``chosen``, each a list with a dict for each group of
            `optimizer`.
        """
        return {
            "options": self._list_options(self.optimizer),
            "chosen": [copy_options(each) for each in self._chosen],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore hyperparameters, but for those that the factory has chosen otherwise since.

        Nothing is restored if the factory now makes another number of parameter groups.

        Args:
            state: A result of `state_dict`.
        """
        options, chosen = state["options"], state["chosen"]
        if len(options) != len(self._chosen):
            return
        groups = zip(self.optimizer.param_groups, options, chosen, self._chosen, strict=True)
        for group, kept, before, now in groups:
            changed = _find_differences(before, now)
            group.update(copy_options({key: kept[key] for key in kept if key not in changed}))

    def _make(self, parameters: Sequence[nn.Parameter]) -> Optimizer:
        """Call the factory with some parameters, without effects on the rest of the process.

        Returns:
            The optimizer.

        Raises:
            TypeError: The factory returned something other than an optimizer.
            ValueError: The factory returned an optimizer of other parameters.
        """
        devices = [*{each.device for each in parameters}]
        with keeping_settings(), PrivateGenerators(self._seed).using(devices):
            made: Any = self._factory([*parameters], copy_options(self._options))
        _check_made(made, parameters)
        return made  # type: ignore[no-any-return]

    @staticmethod
    def _list_options(optimizer: Optimizer) -> list[dict[str, Any]]:
        """Return copies of the hyperparameters of each parameter group of an optimizer."""
        return [copy_options(group) for group in optimizer.param_groups]


def _find_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> set[str]:
    """Return the keys of `now` that are new, or whose values differ from those before."""
    return {key for key in now if key not in before or not is_equal(before[key], now[key])}


def _check_made(made: Any, parameters: Sequence[nn.Parameter]) -> None:
    """Check that a factory returned an optimizer of the parameters that it was given.

    Raises:
        TypeError: It returned something other than an optimizer.
        ValueError: The optimizer has other parameters.
    """
    if not isinstance(made, Optimizer):
        raise TypeError(
            f"optimizer=… returned {type(made).__name__}: expected a torch.optim.Optimizer; return "
            "an optimizer of the parameters that the function is called with"
        )
    held = [id(p) for group in made.param_groups for p in group["params"]]
    if sorted(held) != sorted(map(id, parameters)):
        count = format_count(len(held), "parameter")
        raise ValueError(
            f"optimizer=… returned a {type(made).__name__} with {count}: expected exactly the "
            f"{len(parameters)} that the function is called with; return an optimizer of all of "
            "them and of no other"
        )
