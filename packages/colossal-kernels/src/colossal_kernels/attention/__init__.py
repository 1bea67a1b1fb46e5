"""What stands around the attention that torch computes."""
