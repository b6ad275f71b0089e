"""`python -m scripts.import_model` is the command `nanochat import_model`."""

from nanochat.cli import run

if __name__ == "__main__":
    run("import_model")
