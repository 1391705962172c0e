"""Decide which steps, layers and elements are observed, and keep what lasts from step to step.

Read `monitor` first: `UpdateMonitor` connects the other files.

- Which steps: `policy` decides, by the `schedule` and by the time that `overhead` measures.
  `backward_steps` joins the steps that optimizers make inside of one backward pass.
- Which layers and elements: `layer_settings` resolves the user's `SamplingRule`s for single layers,
  `elements` draws samples of large layers, and `unjudged` leaves out formats that are no coarser
  than the weights are stored, and so would lose nothing more.
- What rounding to few bits undoes, as far as hyperparameters tell: `known_losses` warns of it.
  `optimizer_factors` finds by which factors an optimizer multiplies weights and states, and
  `rounded_factors` which numbers a factor leaves as they are. `lagging_average` warns of an average
  of weights in 16 bits.
- The measurement: `engine` measures a step, most layers together in an `arena`, under the scales
  that `scale_state` keeps.
- How many weights of a run in 16 bits differ from the start, without twins: `start_weights`.
- Weights that move outside of the observed steps: `bypass` finds them.
- For other folders of the package: ranks compare a `watch`, `describe` writes a dry run as a table,
  and `header` describes a run as plain data. From `twin_layers`, *twins* take their elements; these
  are samples of the layers that are stored and stepped in other formats.
"""
