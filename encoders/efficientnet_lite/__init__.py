"""EfficientNet-Lite0: a small convolutional picture encoder; see README.md."""
