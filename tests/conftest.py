"""Settings for all tests."""

import torch

# The suite runs in one process a core: more threads would only wait for each other.
torch.set_num_threads(1)
