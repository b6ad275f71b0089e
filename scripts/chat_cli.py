"""`python -m scripts.chat_cli` is the command `nanochat chat_cli`."""

from nanochat.cli import run

if __name__ == "__main__":
    run("chat_cli")
