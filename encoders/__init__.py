"""Encoders: from a decoded medium to embeddings in the language model's space.

Importing this room loads nothing; take what is needed from its modules.
"""
