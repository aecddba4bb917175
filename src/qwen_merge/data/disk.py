"""What the file system refuses, as a message for the user: a full disk, a folder that cannot be written to.

    with told("the folder data"):
        ...

Used by whatever `qwen-merge data` writes; what was complete before the error stays, so each message names the way on.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from qwen_merge.errors import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def refusal(error: OSError, where: object = "") -> UserError:
    """The error with its file, or with `where` if it names none (a write that fails does not say to which file)."""
    place = error.filename or where or "a file"
    reason = error.strerror or str(error) or type(error).__name__
    if error.errno in _FULL:
        mend = "Make room, or choose an --output on a larger disk."
    else:
        mend = "Check the path and its permissions."
    return UserError(
        f"{place}: {reason}. {mend} What was finished is kept; a command that has --resume goes on with it."
    )


@contextmanager
def told(where: object = "") -> Iterator[None]:
    """Raise an OSError as a UserError; not that of a pipe, which is for the command line."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise refusal(error, where) from error
