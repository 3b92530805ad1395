"""Where tables are printed."""

from rich.console import Console

__all__ = ["terminal"]


def terminal() -> Console:
    """Make a console of 100 columns where there is no terminal to ask."""
    console = Console()
    return console if console.is_terminal else Console(width=100)
