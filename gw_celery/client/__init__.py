"""Declaring as Celery tasks, calling, and awaiting answers: what a web process loads."""
