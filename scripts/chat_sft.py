"""`python -m scripts.chat_sft` is the command `nanochat chat_sft`."""

from nanochat.cli import run

if __name__ == "__main__":
    run("chat_sft")
