"""Texts, and a search over them by meaning."""
