"""`python -m scripts.reward_train` is the command `nanochat reward_train`."""

from nanochat.cli import run

if __name__ == "__main__":
    run("reward_train")
