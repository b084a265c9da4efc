"""What was stored, what is near, and what it says about the next token."""
