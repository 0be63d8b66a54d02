"""What travels: the protocol's messages, tensors and errors, to Plait's types and back."""
