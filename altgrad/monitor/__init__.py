"""Decide which steps, layers and elements are observed, and keep what lasts from step to step.

Read `monitor` first: `UpdateMonitor` connects the other files.

- Which steps: `policy` decides, by the `schedule` and by the time that `overhead` measures.
- Which layers and elements: `layer_settings` resolves the rules, `elements` draws samples,
  `unjudged` leaves out what cannot be judged.
- What is lost in any case: `known_losses` tells it, by the factors that `optimizer_factors` finds
  and `rounded_factors` compares with the spacing of a format. For averages of weights,
  `lagging_average` tells it.
- The measurement: `engine` measures a step, most layers together in an `arena`, under the scales
  that `scale_state` keeps.
- Weights that move without a step of the optimizer: `bypass` finds them.
- For other rooms: ranks compare a `watch`, twins take their elements from `twin_layers`,
  `describe` writes a dry run as a table, and `header` describes a run as plain data.
"""
