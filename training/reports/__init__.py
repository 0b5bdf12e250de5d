"""Pictures and tables of a training and of an evaluation."""
