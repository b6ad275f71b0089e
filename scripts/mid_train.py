"""`python -m scripts.mid_train` is the command `nanochat mid_train`."""

from nanochat.cli import run

if __name__ == "__main__":
    run("mid_train")
