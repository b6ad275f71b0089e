"""`python -m scripts.base_train` is the command `nanochat base_train`."""

from nanochat.cli import run

if __name__ == "__main__":
    run("base_train")
