"""The vision tower of a Qwen3-VL model as an encoder; see README.md."""
