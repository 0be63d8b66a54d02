"""VideoMAE checkpoints of transformers."""
