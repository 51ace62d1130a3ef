"""Tables and figures from result records; nothing here runs a model."""
