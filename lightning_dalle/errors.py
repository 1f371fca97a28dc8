"""Exception for mistakes of the user; the command line prints its message and exits with status 2."""


class UserError(ValueError):
    """Mistake that the user can fix; its message gives the offending value and what to do."""
