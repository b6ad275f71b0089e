"""`python -m scripts.chat_rl` is the command `nanochat chat_rl`."""

from nanochat.cli import run

if __name__ == "__main__":
    run("chat_rl")
