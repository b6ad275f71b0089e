"""One thread: tests are many small computations, and busy machines punish OpenMP's barriers."""

import torch

torch.set_num_threads(1)
