"""Reinforcement learning in seconds on a CPU, of any tiny model: `chat_rl configs/rl_tiny.py`. The tests train it."""

tasks = ("arithmetic:digits=1,n=1000",)
num_iterations = 3
n_prompts = 4
n_samples = 4
max_tokens = 8
device_batch_size = 16
eval_prompts = 8
