"""How we hang in a Celery worker: signals, bootsteps, a request class, control commands."""
