"""interactdiff.interaction"""
