"""The simulator, a command: replays a trace of arrivals through the autoscaler's policy."""
