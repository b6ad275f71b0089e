"""Three minutes of training on about a megabyte of text, on a CPU: any pattern, with a vocabulary of 512 tokens."""

depth = 4
d_model = 128
sequence_len = 256
device_batch_size = 4
eval_every = 500
max_minutes = 3.0
warmdown = 0.7
eval_tokens = 262144
