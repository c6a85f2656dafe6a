"""interactdiff.evaluation"""
