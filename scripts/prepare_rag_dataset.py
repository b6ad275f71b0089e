"""`python -m scripts.prepare_rag_dataset` is the command `nanochat prepare_rag_dataset`."""

from nanochat.cli import run

if __name__ == "__main__":
    run("prepare_rag_dataset")
