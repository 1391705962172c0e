"""`StoreAs`: train with weights and optimizer states stored as a recipe says.

A recipe names number formats and a way to round. The callback attaches the `WeightStorage` of a
recipe to the Trainer's optimizers.

Nothing needs to be read before this file. `session` calls `attach_storages` before it observes the
optimizers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from altgrad import Recipe, SamplingRule, WeightStorage
from altgrad.quantization import Scaling
from altgrad.recipes import get_recipes
from altgrad_lightning.packages import Callback
from altgrad_lightning.pickles import find_own_attributes
from altgrad_lightning.strategies import explain_no_storage

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer


class StoreAs(Callback):
    """A Lightning callback that trains with weights and optimizer states in other number formats.

    A recipe says which formats, and how to round. `StoreAs` is `altgrad.Recipe.attach` for a
    Trainer of `lightning` or `pytorch_lightning`. It rounds weights and states when training
    starts, after a checkpoint is restored, and after each optimizer step. The tensors keep their
    dtype and hold only values of the formats.

    Checkpoints hold scales, rounding errors for Kahan summation, and the state of the random
    numbers. A run that is resumed with ``fit(ckpt_path=…)`` equals an uninterrupted one, bit for
    bit. Without a checkpoint, each training starts from the weights alone.

    The recipe holds for all optimizers of the Trainer. Optimizers that replace these are included
    from the next batch on. Under DDP, all ranks store the same values. Other strategies with
    several processes are refused. Validation, testing and prediction change no weight. Averages
    that ``EMAWeightAveraging`` puts into the model are not rounded. ``StochasticWeightAveraging``
    ends with an optimizer step if the model has batch norm, and this step rounds its averages.

    Among the callbacks, a `PrecisionMonitor` may come before or after `StoreAs`. A callback of
    yours with an `altgrad.UpdateMonitor` comes after it. A Trainer takes one `StoreAs`; `layers`
    gives single layers another format.

    Examples:
        >>> from altgrad_lightning import StoreAs
        >>> StoreAs("bf16-sr").recipe.rounding  # Trainer(callbacks=[StoreAs("bf16-sr")])
        'stochastic'

    Args:
        recipe: A short name, such as ``"bf16-sr"``, that `altgrad.recipes.get_recipes` knows, or a
            `Recipe` of formats. Recipes that need other tensors or another optimizer, such as
            ``"bf16-true"``, are refused.
        scaling: Which weights share a scale, as in `altgrad.WeightStorage`.
        layers: Rules for single layers, as in `altgrad.WeightStorage`, with the names of the
            module's parameters.
        seed: The seed of stochastic rounding.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: The recipe is unknown or refused, an argument is invalid, or, when training
            starts, a rule matches no layer, a layer cannot be stored, or the strategy is refused.
    """

    def __init__(
        self,
        recipe: str | Recipe,
        *,
        scaling: Scaling | None = "tensor",
        layers: Sequence[SamplingRule] = (),
        seed: int = 0,
    ) -> None:
        if not isinstance(recipe, (str, Recipe)):
            raise TypeError(
                f"recipe={recipe!r}: expected a short name such as 'bf16-sr', or a Recipe"
            )
        (self._recipe,) = get_recipes(recipe)
        self._arguments: dict[str, Any] = {"scaling": scaling, "layers": (*layers,), "seed": seed}
        self._storage = self._make_storage()  # of the current training, else of the last one
        self._optimizers: list[Any] = []  # those to which the storage is attached

    @property
    def recipe(self) -> Recipe:
        """The recipe that says how weights and states are stored."""
        return self._recipe

    @property
    def formats(self) -> dict[str, str]:
        """The name of the format of each stored layer, by the name of the layer.

        Empty before the first training starts.
        """
        return self._storage.formats

    # --- Lightning's hooks, in the order in which a Trainer calls them

    def setup(self, trainer: Trainer, _: LightningModule, stage: str) -> None:
        """Raise an error if the Trainer's strategy is refused, and begin with a new storage.

        The storage, a `WeightStorage`, rounds weights and states after each optimizer step.

        Args:
            trainer: The Trainer.
            stage: ``"fit"``, or another stage, which changes nothing.

        Raises:
            ValueError: The strategy is refused.
        """
        if stage == "fit":
            _check_strategy(trainer)
            self._detach()  # another callback that raised may have kept Lightning from doing so
            self._storage = self._make_storage()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state of a checkpoint: at once if attached, otherwise when training starts.

        Lightning's learning rate finder also restores a state in mid-training.
        """
        self._storage.load_state_dict(state_dict)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Round weights and optimizer states to their formats, now and after each optimizer step.

        When Lightning calls this hook, they are restored and on their device.
        """
        self.attach(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any
    ) -> None:
        """Round weights and optimizer states to their formats, if optimizers have been replaced.

        The module or another callback may replace optimizers in mid-training. Those that are new
        are rounded from now on, after each of their steps.
        """
        self.attach(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint: scales, rounding errors and state of random numbers.

        Returns:
            The dict that `WeightStorage.state_dict` returns.
        """
        return self._storage.state_dict()

    def on_exception(self, *_: Any) -> None:
        """Stop rounding. After an error or Ctrl-C, Lightning calls this instead of `teardown`."""
        self._detach()

    def teardown(self, *_: Any, **__: Any) -> None:
        """Stop rounding. The state of the training stays for checkpoints."""
        self._detach()

    # --- the storage

    def attach(self, trainer: Trainer, module: LightningModule) -> None:
        """Round weights and states now and after each step of the Trainer's optimizers.

        If that is done already for these optimizers, nothing changes.

        Args:
            trainer: The Trainer, whose training has started.
            module: The module that is trained. Its parameters' names are those of the layers.

        Raises:
            ValueError: A rule matches no layer, a layer cannot be stored, or the parameters are
                sharded.
            RuntimeError: An optimizer is observed already.
        """
        if trainer.optimizers == self._optimizers:
            return
        self._detach()
        _check_strategy(trainer)
        self._storage.attach(*trainer.optimizers, module=module)
        self._optimizers = [*trainer.optimizers]

    def _detach(self) -> None:
        self._storage.detach()
        self._optimizers = []

    def _make_storage(self) -> WeightStorage:
        return self._recipe.make_storage(**self._arguments)

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes for a pickle: a new storage, without the module and optimizers."""
        own = find_own_attributes(self)
        return {**own, "_storage": self._make_storage(), "_optimizers": []}


def attach_storages(trainer: Trainer, module: LightningModule) -> None:
    """Make each `StoreAs` callback of a Trainer round the weights, before anything observes them.

    An observer must see weights as they are stored. Without this call, that would depend on the
    order of the callbacks.

    Args:
        trainer: The Trainer, whose training has started.
        module: The module that is trained.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, StoreAs):
            callback.attach(trainer, module)


def _check_strategy(trainer: Trainer) -> None:
    """Raise ValueError if weights under the Trainer's strategy cannot be stored in a format."""
    if reason := explain_no_storage(trainer):
        raise ValueError(f"StoreAs cannot store weights under this strategy: {reason}")
