"""What the autoscaler would have done: a trace of arrivals, replayed through the policy itself."""
