"""Settings for every test."""

import torch

# Small tensors on many threads of a busy machine wait more than they compute.
torch.set_num_threads(1)
