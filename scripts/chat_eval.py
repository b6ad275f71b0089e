"""`python -m scripts.chat_eval` is the command `nanochat chat_eval`."""

from nanochat.cli import run

if __name__ == "__main__":
    run("chat_eval")
