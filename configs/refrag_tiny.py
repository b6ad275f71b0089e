"""Searching in seconds on a CPU, of any tiny model: `refrag_finetune configs/refrag_tiny.py`. The tests train it."""

sequence_len = 512
contexts = "entities=60,per_world=8"
max_hops = 2
top_k = 1
warm_start_steps = 10
num_iterations = 2
n_prompts = 4
n_samples = 4
max_tokens = 32
device_batch_size = 8
eval_prompts = 4
eval_tokens = 2048
