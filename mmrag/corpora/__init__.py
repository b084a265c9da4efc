"""Readers and makers of corpora: everything that yields Utterances."""
