"""The models and data that come with the package."""

# Names that stand for the shipped models wherever a model is asked for.
SHIPPED = ("byte_llama", "moving_wan")
