"""Sound to discrete units: audio files, voice activity, HuBERT, k-means, the tokenized corpus."""
