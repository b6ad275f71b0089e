"""`python -m scripts.rag_finetune` is the command `nanochat rag_finetune`."""

from nanochat.cli import run

if __name__ == "__main__":
    run("rag_finetune")
