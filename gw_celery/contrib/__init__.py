"""Integrations with other software; each module imports its library only in itself."""
