"""Verdicts on a run and its layers, from the figures of the run: what each recipe keeps.

A *recipe* says how weights and optimizer states are stored. A *twin* is a sample of a layer that is
stored so and stepped beside the training. `altgrad.report` has the public names.

Read `calibration` first: thresholds, and outcomes of real runs. `verdicts` has the types, `tallies`
summarizes the figures of a layer, `step_rules` and `twin_rules` judge layers, `families` sorts
recipes, `run_rules` judges the run, `remedies` says what to do, `summaries` puts it in words, and
`judge` does all of this. `decimals` writes shares so that they agree with the verdict beside them.
"""
