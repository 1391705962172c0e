"""The same step on several ranks: each rank measures local shards, all ranks get equal figures.

Read `peers` first, which describes the two kinds of ranks: `Alone`, a rank without others, and the
ranks of a run `together`, which agree on layers and settings before they observe.

- `ranks` reports the error of one rank on all ranks. `step_message` packs a step into one SUM and
  one MAX all-reduce, and `host_group` carries the all-reduces, and texts.
- `shards` reads from a DTensor which elements this rank holds, `layers` keeps the shards of a
  model, and `replicas` compares the replicas of a layer.
"""
