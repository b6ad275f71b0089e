"""`python -m scripts.download` is the command `nanochat download`."""

from nanochat.cli import run

if __name__ == "__main__":
    run("download")
