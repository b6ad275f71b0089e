"""`python -m scripts.chat_web` is the command `nanochat chat_web`."""

from nanochat.cli import run

if __name__ == "__main__":
    run("chat_web")
