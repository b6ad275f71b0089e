"""Search in several hops with configs/hybrid_alternating_d20.py: `refrag_finetune configs/refrag_hybrid_d20.py
--knowledge_base DIRECTORY`.

The architecture comes from the checkpoint that --source names (rag by default).
"""

depth = 20
pattern = "alternate"
sequence_len = 4096  # three searches of three passages of 200 words, the queries, the question and the answer
max_hops = 3
top_k = 3
warm_start_steps = 1000
warm_start_rows = 4
num_iterations = 300
lr_scale = 0.05
n_prompts = 64
n_samples = 8
max_rows = 256
max_tokens = 256
device_batch_size = 8  # answers with their documents, in a forward pass
kl = 0.001  # long runs drift; the second model costs a third more memory
minibatches = 2
