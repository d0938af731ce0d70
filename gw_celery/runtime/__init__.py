"""What runs inside a process that serves: its loop, its loaded state, the bodies of its tasks."""
