"""Run the study: methods, tasks, seeds and toolchains, from one command to tables and figures."""
