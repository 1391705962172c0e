"""Decide which steps, layers and elements are observed, and keep what lasts from step to step.

Read `monitor` first: `UpdateMonitor` makes the parts in the other files, and connects them.

- Which steps: `training_steps` asks `policy`, which decides by the `schedule` and by the time that
  `overhead` measures. `backward_steps` joins the steps that optimizers make inside of one backward
  pass.
- Which layers and elements: `layer_settings` resolves the user's `SamplingRule`s for single layers,
  and `measured_layers` lists those that are left. `elements` draws samples of large layers, and
  `unjudged` leaves out formats that are no coarser than the weights are stored, and so would lose
  nothing more.
- What rounding to few bits undoes, as far as hyperparameters tell: `known_losses` warns of it.
  `optimizer_factors` finds by which factors an optimizer multiplies weights and states, and
  `rounded_factors` which numbers a factor leaves as they are. `lagging_average` warns of an average
  of weights in 16 bits.
- The measurement: `recorder` makes the record of a step, over the ranks that `sharding` finds.
  `engine` measures the step on this rank, most layers together in an `arena`, under the scales that
  `scale_state` keeps.
- Samples that are followed from the start: `run_samples`. They are *twins*, stored and stepped as
  recipes say, whose elements come from `twin_layers`; or, without recipes, `start_weights`.
- What a resumed run needs: `checkpoint`. `moved_history` has the elements that moved before.
- Weights that move outside of the observed steps: `bypass` finds them.
- For other folders of the package: ranks compare a `watch`, `describe` writes a dry run as a table,
  and `run_header` describes a run as plain data, whose parts are in `header`, `run_storage` and
  `state_sizes`.
"""
