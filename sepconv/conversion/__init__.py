"""From a model and what the user asks for to a converted model: the story of `convert`."""
