"""The batch door: one script a stage, each `python -m jobs.<stage> --config FILE key=value…`."""
