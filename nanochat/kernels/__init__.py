"""One file an operation: a reference in plain torch, fast versions, one dispatcher (`NANOCHAT_KERNEL_<OP>=name`)."""
