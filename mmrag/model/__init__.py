"""Ids to states and back: the language model, its adapter, their training. No audio, no search."""
