"""The models and data that come with the package."""
