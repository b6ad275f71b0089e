"""RAG fine-tuning of configs/mamba_d20.py: `rag_finetune configs/rag_mamba_d20.py --knowledge_base DIRECTORY`.

The architecture comes from the checkpoint that --source names (mid by default).
"""

depth = 20
pattern = "mamba"
sequence_len = 4096  # five to eight passages of 200 words, the question and the answer, several times a row
device_batch_size = 4
total_batch_size = 131072  # many small steps: the look-up is learnt in sudden steps, not by large batches
top_k = 5
absent = 0.15
