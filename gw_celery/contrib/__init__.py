"""Ties to other software: each module imports its library, and nothing else here does."""
