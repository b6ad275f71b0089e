"""`python -m scripts.doctor` is the command `nanochat doctor`."""

from nanochat.cli import run

if __name__ == "__main__":
    run("doctor")
