"""Runs task bodies in any process that serves: our child, prefork, solo, eager mode, tests."""
