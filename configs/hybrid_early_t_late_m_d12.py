"""Hybrid, 12 layers: attention in the first half of the layers, Mamba (S6) in the second.

For base_train, mid_train and chat_sft alike.
"""

depth = 12
pattern = "early"
ssm = "M"
sequence_len = 2048
device_batch_size = 16  # lower it, or add configs/gpu/*.py, when memory runs out
total_batch_size = 524288  # tokens a step over all GPUs, whatever the device batch; small SFT sets want less
