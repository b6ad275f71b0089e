"""`python -m scripts.quickstart` is the command `nanochat quickstart`."""

from nanochat.cli import run

if __name__ == "__main__":
    run("quickstart")
