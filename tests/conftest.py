"""What holds for every test."""

import torch

# Small tensors on many threads, beside other work on the machine, wait more than they compute.
torch.set_num_threads(1)
