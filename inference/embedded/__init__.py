"""The model that comes with the project, so that a first start needs no download."""
