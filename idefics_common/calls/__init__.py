"""The arguments of a call of either model: checks and rules on sizes alone, which both rooms share."""
