"""The Django side of gw_celery: settings, preset and system checks."""
