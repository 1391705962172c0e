"""Ways to train, each run with and without a monitor, and the page of what came out."""
