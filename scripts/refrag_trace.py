"""`python -m scripts.refrag_trace` is the command `nanochat refrag_trace`."""

from nanochat.cli import run

if __name__ == "__main__":
    run("refrag_trace")
