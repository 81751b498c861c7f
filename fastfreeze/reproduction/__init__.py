"""What the two papers trained and report, and the runs that stand beside it."""
