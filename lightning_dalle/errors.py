"""The one exception that means "the user can fix this": the command line prints its sentence and exits with 2."""


class UserError(ValueError):
    """A mistake in what was asked for, said in one sentence that names the two things that disagree."""
