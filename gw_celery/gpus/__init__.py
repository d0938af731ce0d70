"""The GPUs of a machine, and their division among replicas, in the worker's parent."""
