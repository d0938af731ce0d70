"""What the JSON API answers when it cannot do what was asked."""

from __future__ import annotations


class ApiError(Exception):
    """Raised to answer with an HTTP status, the kind of error and a sentence for the reader."""

    def __init__(self, status: int, kind: str, message: str) -> None:
        super().__init__(status, kind, message)
        self.status = status
        self.kind = kind
        self.message = message

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}"


def bad_input(message: str, status: int = 400) -> ApiError:
    """Return the error for input that breaks a rule of the API."""
    return ApiError(status, "BadInput", message)
