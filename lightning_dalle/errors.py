"""Exception for mistakes of the user; the command line prints its message and exits with status 2."""

import re


class UserError(ValueError):
    """Mistake that the user can fix; its message gives the offending value and what to do."""


def missing_extra(error: ModuleNotFoundError) -> str | None:
    """Return a message that names the extra with a missing package, or None if no extra has it."""
    from importlib.metadata import requires

    module = (error.name or "").partition(".")[0].replace("-", "_")
    package = {"faiss": "faiss-cpu"}.get(module, module.replace("_", "-"))
    for requirement in requires("lightning-dalle") or ():
        if match := re.fullmatch(rf"{package}\W.*extra == '(?!all)(\w+)'", requirement):
            return f"{package} is not installed: pip install 'lightning-dalle[{match[1]}]', or [all] for everything"
    return None
