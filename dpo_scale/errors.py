"""Errors that a user can mend. The commands print their message without a traceback and exit with 2."""

USER_ERROR = 2
"""Exit code of a command or a rank that ends over one."""


class UserError(ValueError):
    """Something outside the program is wrong: a file, a row, a setting. The message says what, where and the fix."""

    def __init__(self, message: str, *, may_pass: bool = False) -> None:
        super().__init__(message)
        self.may_pass = may_pass
        """Whether the same command may succeed later with nothing mended: a batch script then tries once more."""


class RecipeError(UserError):
    """A recipe that cannot be run as it is written."""


class DataError(UserError):
    """Preference data that cannot be read or trained on."""
