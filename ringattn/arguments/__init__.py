"""The rules of arguments: what each door of the library asks of what it is given."""
