"""Speed and memory of models, layers and generation, as a recipe says."""
