"""`python -m scripts.base_eval` is the command `nanochat base_eval`."""

from nanochat.cli import run

if __name__ == "__main__":
    run("base_eval")
