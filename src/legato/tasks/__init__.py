"""Tasks that come with legato, each with an experiment (a YAML file)."""
