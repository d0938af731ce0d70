"""What workers tell each other in Redis."""
