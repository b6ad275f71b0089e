"""`python -m scripts.report` is the command `nanochat report`."""

from nanochat.cli import run

if __name__ == "__main__":
    run("report")
