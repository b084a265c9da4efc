"""How fast things are, and what they withstand: a module a subject, run by `__main__`."""
