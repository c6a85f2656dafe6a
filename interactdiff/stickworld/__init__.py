"""interactdiff.stickworld"""
