"""A recipe from its YAML file to a trained run: where recipes lie, how they are read, checked and carried out."""
