"""Watch the trainings of other libraries: each file is an adapter for one of them.

All adapters attach an `altgrad.UpdateMonitor` to the optimizer, write a run file, and judge the run
at its end. Read `step_numbers` and `run_watch` first: `RunWatch` does this for any loop, as
``altgrad.watch``, and the adapters pass it what their library knows.

- `transformers` has `PrecisionCallback`, for the Trainer of Hugging Face.
- `accelerate` and `fabric` have each a function `watch`, for a loop with an Accelerator or Fabric.

The callback for the Trainer of Lightning is `altgrad_lightning.PrecisionMonitor`. An adapter is
imported by its own name, such as ``from altgrad.integrations.fabric import watch``.
"""
