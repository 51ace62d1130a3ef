"""Make tables, figures and reports from result records, without running a model."""
