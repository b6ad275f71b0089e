"""`python -m scripts.tok_train` is the command `nanochat tok_train`."""

from nanochat.cli import run

if __name__ == "__main__":
    run("tok_train")
