"""`python -m scripts.refrag_finetune` is the command `nanochat refrag_finetune`."""

from nanochat.cli import run

if __name__ == "__main__":
    run("refrag_finetune")
