"""Mamba-2, 20 layers: Mamba-2 (SSD) in every layer, no attention.

For base_train, mid_train and chat_sft alike.
"""

depth = 20
pattern = "mamba2"
sequence_len = 2048
device_batch_size = 8  # lower it, or add configs/gpu/*.py, when memory runs out
total_batch_size = 524288  # tokens a step over all GPUs, whatever the device batch; small SFT sets want less
