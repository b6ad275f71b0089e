"""`python -m scripts.export_model` is the command `nanochat export_model`."""

from nanochat.cli import run

if __name__ == "__main__":
    run("export_model")
