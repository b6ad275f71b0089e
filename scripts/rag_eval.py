"""`python -m scripts.rag_eval` is the command `nanochat rag_eval`."""

from nanochat.cli import run

if __name__ == "__main__":
    run("rag_eval")
