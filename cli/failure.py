"""How a command ends when it cannot do its work."""

from __future__ import annotations

from typing import IO, Any

import click


class Failure(click.ClickException):
    """Ends the command with ``Error: message`` and ``Hint: hint`` on stderr.

    Parameters
    ----------
    exit_code : 1 if something was looked for and not found, 2 for errors.
    """

    def __init__(self, message: str, hint: str = "", exit_code: int = 2) -> None:
        super().__init__(message)
        self.hint = hint
        self.exit_code = exit_code  # type: ignore[misc]  # click declares it for the class

    def show(self, file: IO[Any] | None = None) -> None:
        """Write the two lines."""
        click.echo(f"{click.style('Error:', fg='red')} {self.message}", file=file, err=file is None)
        if self.hint:
            click.echo(f"{click.style('Hint:', fg='yellow')} {self.hint}", file=file, err=file is None)
