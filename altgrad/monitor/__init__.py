"""Decide which steps, layers and elements are observed, and keep what lasts from step to step.

Read `monitor` first: `UpdateMonitor` connects the other files.

- Which steps: `policy` decides, by the `schedule` and by the cost that `overhead` bounds.
- Which layers and elements: `layer_settings` resolves the rules, `elements` draws samples,
  `unjudged` leaves out what cannot be judged.
- The measurement: `engine` measures a step, most layers together in an `arena`, under the scales
  that `scale_state` keeps.
- For other rooms: `watch` is what ranks compare, `describe` prints a dry run, and `header`
  describes a run as plain data.
"""
