"""Runs only in a child process of our pool."""
