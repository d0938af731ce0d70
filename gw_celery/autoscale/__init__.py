"""How many replicas there should be: what decides is pure, what reads queues and starts is not."""
