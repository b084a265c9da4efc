"""The science of mmrag, in one process: audio to units, language model, datastore, transcript."""
