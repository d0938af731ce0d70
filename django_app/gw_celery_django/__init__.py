"""The Django app of gw_celery: settings, preset and system checks, in Django's processes."""
