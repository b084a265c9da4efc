"""The online door: the transcription service on Ray Serve. Nothing is served yet."""
