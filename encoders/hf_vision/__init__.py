"""Vision towers of transformers: CLIP, SigLIP, SigLIP2, DINOv2 and ViT; see README.md."""
