"""The same optimizer step, measured on several ranks: all get equal figures (values of metrics).

A rank is one process of a torch.distributed run. Each rank measures its local shards, which are the
elements of parameters that it holds. Read `peers` first, with the interface of ranks and `Alone`, a
rank without others. `together` implements the interface for ranks that share parameters.

- `ranks` reports the error of one rank on all ranks. `step_message` packs a step into one SUM and
  one MAX all-reduce, and `twin_message` the twins of the step. `host_group` carries out the
  all-reduces, and exchanges texts.
- `shards` reads from a DTensor which elements this rank holds, `layers` keeps the shards of a
  model, and `replicas` compares the replicas of a layer.
"""
