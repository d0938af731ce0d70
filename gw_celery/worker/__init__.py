"""Our parts of a Celery worker's parent: start-up, bootsteps, consumer, control commands."""
