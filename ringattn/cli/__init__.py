"""The command line, ``ringattn``. It needs typer and rich, which the library itself does not."""
