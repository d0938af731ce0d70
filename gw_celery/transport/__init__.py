"""Our Redis transport for kombu, and how results are written to Redis."""
