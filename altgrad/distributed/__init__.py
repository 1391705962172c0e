"""The same step on several ranks: each measures local shards, all get the figures of the whole.

Read `peers` first: `Alone`, or the ranks of a run `together`, which agree before they observe.

- `ranks` reports the error of one rank on all; `step_message` packs a step into one SUM and one
  MAX, and `host_group` carries these, and texts.
- `shards` reads from a DTensor which elements this rank holds, `layers` keeps the shards of a
  model, and `replicas` compares the replicas of a layer.
"""
