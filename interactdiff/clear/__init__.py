"""CLEAR."""
from interactdiff.clear.attention import local_attention
from interactdiff.clear.pattern import ClearError, Pattern, proportional_scale
