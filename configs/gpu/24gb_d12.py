"""For a card with 24 GB and a model of depth 12:
`nanochat base_train configs/transformer_d12.py configs/gpu/24gb_d12.py`.

Predicted from a memory formula for a Transformer at 2048 tokens, not measured. Blocks with Mamba may keep more:
halve device_batch_size when memory runs out; total_batch_size, and so the training, stays as it is.
"""

device_batch_size = 16
