"""Any image encoder over the frames of a film."""
