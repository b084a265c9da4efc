"""The paper's experiments with one model, and the report of their results."""
