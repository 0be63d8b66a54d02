"""The engine behind the primitives: a controller that plans, an executor per rank that computes."""
