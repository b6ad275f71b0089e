"""RAG fine-tuning of configs/hybrid_alternating_d20.py, as configs/rag_mamba_d20.py.

The architecture comes from the checkpoint that --source names (mid by default).
"""

depth = 20
pattern = "alternate"
sequence_len = 4096
device_batch_size = 4
total_batch_size = 131072
top_k = 5
absent = 0.15
