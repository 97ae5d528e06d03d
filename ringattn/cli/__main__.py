"""``python -m ringattn.cli``."""

from ringattn.cli.main import app

if __name__ == "__main__":
    app(prog_name="ringattn")
