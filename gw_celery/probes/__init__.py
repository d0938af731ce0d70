"""Is a replica well: what follows from the answers of its probes."""
