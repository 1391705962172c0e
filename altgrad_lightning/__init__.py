"""AltGrad for Lightning: two callbacks for number formats, `PrecisionMonitor` and `StoreAs`.

`PrecisionMonitor` watches an ordinary training, and judges how well number formats would store its
weights. `StoreAs`, in `store_as`, trains with weights and optimizer states stored in formats.

Read the files of `PrecisionMonitor` in the order of the data:

1. `callback`: `PrecisionMonitor`, its arguments and the hooks of Lightning. `settings` checks the
   arguments; `packages` finds Lightning.
2. `session`: one training under observation. `strategies` decides which ranks observe, `result`
   holds the findings, and `notices` warns the user. `steps` and `due_batches` decide which steps
   are observed. `callback_metrics` passes figures to other callbacks, and `handover` passes the
   findings out of a process that Lightning has spawned.
3. The room `altgrad.output`: the run file and the loggers.

`pickles` is about pickled callbacks. `demo` and `demo_model` are ``altgrad demo``.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from altgrad_lightning.callback import PrecisionMonitor
    from altgrad_lightning.store_as import StoreAs

__all__ = ["PrecisionMonitor", "StoreAs"]

if not TYPE_CHECKING:  # a module with __getattr__ has any name for mypy, of type Any

    def __getattr__(name: str) -> object:
        """Import a callback, and thus Lightning, when its name is first used (PEP 562)."""
        if name == "PrecisionMonitor":
            from altgrad_lightning.callback import PrecisionMonitor

            return PrecisionMonitor
        if name == "StoreAs":
            from altgrad_lightning.store_as import StoreAs

            return StoreAs
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
