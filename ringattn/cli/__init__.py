"""The command `ringattn`."""

import sys


def main() -> None:
    """The script's entry; without the packages that the command needs it names the extra."""
    try:
        from ringattn.cli.main import app
    except ModuleNotFoundError as error:
        sys.exit(f"error: the command ringattn needs the package {error.name}: pip install 'ringattn[check]'")
    app(prog_name="ringattn")
