"""Who may do what, how much of it at a time, and what is written down about it."""
