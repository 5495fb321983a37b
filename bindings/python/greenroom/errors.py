"""The exceptions of this package: one class per thing a caller may do next.

Every one carries ``code``, the word the sidecar or the native module gave, and ``message``, a sentence for people.
"""

from __future__ import annotations


class GreenroomError(Exception):
    """Base of everything this package raises on purpose."""

    code: str
    message: str

    def __init__(self, code: str, message: str) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message

    def __str__(self) -> str:
        return f"{self.message} [{self.code}]"


class ConfigError(GreenroomError):
    """Wrong configuration, or one that Greenroom refuses: change it and start again."""


class Unavailable(GreenroomError):
    """The sidecar cannot be reached, is shutting down, or did not answer in time: try later or go on without."""


class Busy(GreenroomError):
    """A queue of the sidecar is full: try again after ``retry_after`` seconds."""

    retry_after: float

    def __init__(self, code: str, message: str, retry_after: float = 0.0) -> None:
        super().__init__(code, message)
        self.retry_after = retry_after


class BadRequest(GreenroomError):
    """The request is malformed; the message names the field."""


class TooLarge(BadRequest):
    """The request's body is over the sidecar's limit: send less at once."""


class Unauthorized(GreenroomError):
    """The sidecar wants a token, or another one."""


class NotFound(GreenroomError):
    """No such session, tool call or address."""


class Conflict(GreenroomError):
    """The request contradicts the session's state."""


class ProtocolError(GreenroomError):
    """The answer is not what a Greenroom sidecar sends, or what this version understands."""
