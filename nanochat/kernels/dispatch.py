"""Choose one implementation of an operation: by name from the environment, else the default.

Every kernel file holds a plain dict of implementations and calls `choose`; the choice is logged once a process.
"""

import logging
import os
from collections.abc import Callable, Mapping
from typing import TypeVar

from nanochat.errors import UsageError

Op = TypeVar("Op", bound=Callable[..., object])

logger = logging.getLogger("nanochat")
_logged: set[tuple[str, str]] = set()


def choose(op: str, table: Mapping[str, Op], default: str) -> Op:
    """The implementation of `op` that `NANOCHAT_KERNEL_<OP>` names, else `table[default]`.

    Raises UsageError when the variable names no implementation.
    """
    variable = f"NANOCHAT_KERNEL_{op.upper()}"
    name = os.environ.get(variable) or default
    if name not in table:
        raise UsageError(f"{variable}={name}: no such implementation of {op}; choose from {', '.join(sorted(table))}")
    if (op, name) not in _logged:
        _logged.add((op, name))
        logger.info("kernel %s: %s%s", op, name, "" if name == default else f" (by {variable})")
    return table[name]
