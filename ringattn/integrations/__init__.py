"""Translations between `ringattn` and other libraries. Each is imported on request alone, and either keeps what the
other library asks for or refuses it."""
