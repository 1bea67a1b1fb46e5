"""The colossal command: train, plan, verify and inspect large-model training on one process or many."""
