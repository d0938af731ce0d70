"""Which inputs share one call, and when it is due: pure, on a clock that is an argument."""
