"""Where are weights, and what is loaded?"""
