"""The project folder: the `Project` object, DVC, git, the plan, the published lock."""
