"""Realtime transcription sessions over a WebSocket, as OpenAI's clients speak them."""
