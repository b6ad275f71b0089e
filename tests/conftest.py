"""One thread: tests are many small computations, and busy machines punish OpenMP's barriers."""

import torch

torch.set_num_threads(1)

from tiny_run import chat, knowledge, out  # noqa: E402, F401 (fixtures of chat and terminal)
