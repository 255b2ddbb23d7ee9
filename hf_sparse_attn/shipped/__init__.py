"""The models and data that come with the package.

May import levels 0 to 9 of .github/ARCHITECTURE.md; how they were trained belongs to recipes/.
"""

# Names that stand for the shipped models wherever a model is asked for.
SHIPPED = ("byte_llama", "moving_wan")
