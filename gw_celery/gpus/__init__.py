"""Which GPUs there are, and which replica has which."""
