"""The model designs in PyTorch: dense forward for training and reference, and the pieces decoding runs."""
