"""The two errors that a user may see: a wrong call (exit code 2) and a failure (exit code 1).

A call that names what is not there (a path, a run, a stage) is a wrong one; what is there and damaged, a full disk or
a busy directory is a failure.

Both carry one message that says what was wrong, where (file, line or flag) and what to do. `nanochat.cli` prints the
message without a traceback; everything else that escapes is a bug and keeps its traceback.
"""


class NanochatError(Exception):
    """Something went wrong that the user can act on: a damaged file, a full disk, a directory in use."""

    exit_code = 1


class UsageError(NanochatError):
    """The call itself was wrong: an unknown flag, a name of nothing, a config that contradicts the checkpoint."""

    exit_code = 2
