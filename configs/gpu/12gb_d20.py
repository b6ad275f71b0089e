"""For a card with 12 GB and a model of depth 20:
`nanochat base_train configs/transformer_d20.py configs/gpu/12gb_d20.py`.

Predicted from a memory formula for a Transformer at 2048 tokens, not measured. Blocks with Mamba may keep more:
halve device_batch_size when memory runs out; total_batch_size, and so the training, stays as it is.
"""

device_batch_size = 4
checkpointing = True  # recompute activations: without it little or nothing fits
