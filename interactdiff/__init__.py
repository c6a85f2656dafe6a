"""interactdiff"""
