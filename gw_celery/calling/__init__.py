"""How a task is called, and how its answer comes back."""
