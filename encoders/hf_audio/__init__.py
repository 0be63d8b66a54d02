"""Sound towers of transformers: Whisper, wav2vec2, HuBERT and WavLM; see README.md."""
