"""Twins: try recipes on a sample of a training, at every step of its optimizers.

A *twin* is a recipe at work: it steps a small sample of each layer as the recipe says, with the
gradients of the *run*, the training that is watched. Each file names the one to read before it and
the one to read next:

1. A sample and its numbers: `layout`, `shard_sample`, `sample`, `twin_tensors`, `element_scales`,
    `twin`, `self_check`.
2. The optimizer of a twin: `shared_objects`, `optimizer_copy`, `writes`, `hyperparameters`,
    `generators`, `isolation`, `factory`, `flat_state`, `packed_state`,
    `optimizer_twin`.
3. What the run does: `twin_source`, `drawing`, `layer_plan`, `lane_sorter`, `run_weights`,
    `run_states`, `outside_changes`, `sampled_gradients`, `gradient_sums`, `micro_gradients`,
    `run_average`, `batch_norm`, `average_sample`, `average_followers`, `statistic_follower`,
    `lane_averages`, `fused_sgd`, `stored_layers`.
4. All twins: `lane_twins`, `lane_sums`, `lane`, `twin_state`, `lane_pieces`, `rank_states`,
    `optimizer_run`, `loaded_lanes`, `twin_checks`, `twins`.

Read `altgrad.recipes` first.
"""
