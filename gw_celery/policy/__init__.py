"""Pure decisions, without clock and I/O, for workers, children and the simulator."""
