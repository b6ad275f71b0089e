"""RAG fine-tuning in seconds on a CPU, of any tiny model: `rag_finetune configs/rag_tiny.py`. The tests train it."""

sequence_len = 512
device_batch_size = 1
num_iterations = 20
eval_tokens = 2048
contexts = "n=200,documents=2,questions=4"
top_k = 2
