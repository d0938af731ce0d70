"""The GPUs of a machine, and the share that each replica gets."""
