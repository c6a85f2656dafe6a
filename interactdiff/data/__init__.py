"""interactdiff.data"""
