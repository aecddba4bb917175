"""The one exception that a user is meant to read.

The command line prints its message and leaves with exit code 2; every other exception is a bug and keeps its
traceback. A message says what was seen, what was expected and how to mend it.
"""


class UserError(Exception):
    """Something the user can mend: a wrong path, a wrong file, a wrong option."""

    @classmethod
    def from_list(cls, title: str, problems: list[str]) -> "UserError":
        """Several problems in one message, so that a user mends them in one go."""
        return cls(title + "".join(f"\n  - {problem}" for problem in problems))
