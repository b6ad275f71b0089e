"""`python -m scripts.retrieval` is the command `nanochat retrieval`."""

from nanochat.cli import run

if __name__ == "__main__":
    run("retrieval")
