"""What trains behind the command line: the two papers' models and data, and fine-tuning."""
