"""Errors that a user can mend: one sentence, no traceback."""


class UserError(Exception):
    """Something the user can mend; the message says what is wrong, where, and what to do."""
