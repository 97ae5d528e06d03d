"""The version, here because the package may run from a source tree that is not installed."""

VERSION = "0.1.0"
