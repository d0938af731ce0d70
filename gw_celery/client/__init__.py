"""Declares Celery tasks, sends calls and awaits answers. A web process loads only this."""
