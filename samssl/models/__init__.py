"""SAM, its weights, and what fine-tuning adds to it."""
