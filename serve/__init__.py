"""Transcription over HTTP: OpenAI's API and changing datastores, as Ray Serve deployments."""
