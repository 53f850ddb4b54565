"""Self-supervised continued pretraining and fine-tuning of SAM for radiology."""
