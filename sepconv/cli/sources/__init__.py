"""SOURCE on the command line, turned into a model and what is known of its inputs."""
