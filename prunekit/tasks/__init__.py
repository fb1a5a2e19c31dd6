"""Tasks: where prompts, completions and answers come from."""
