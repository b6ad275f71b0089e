"""Hybrid, tiny: trains in seconds on a CPU, to try things out. The tests train it."""

depth = 4
d_model = 64
head_dim = 32
pattern = "hybrid"
ssm = "M2"
head_dim2 = 32
sequence_len = 128
device_batch_size = 4
num_iterations = 50
eval_tokens = 4096
