"""Settings for all tests."""

import os

# The suite runs in one process a core: more threads would only wait for each other. Before torch and NumPy are loaded,
# whose libraries read it once; processes that tests start inherit it.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import torch  # noqa: E402

torch.set_num_threads(1)
