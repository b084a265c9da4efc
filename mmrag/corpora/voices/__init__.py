"""Speech synthesizers: text and a voice in, a waveform with its timed words out."""
