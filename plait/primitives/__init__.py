"""From what users say to what the engine computes, and back; in process and in the service."""
