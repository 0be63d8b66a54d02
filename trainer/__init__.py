"""Model composition, losses, the engine behind the primitives, training runs, evaluation."""
