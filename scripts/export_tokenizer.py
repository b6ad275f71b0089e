"""`python -m scripts.export_tokenizer` is the command `nanochat export_tokenizer`."""

from nanochat.cli import run

if __name__ == "__main__":
    run("export_tokenizer")
