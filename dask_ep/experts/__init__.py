"""Where do weights lie, and what is loaded?"""
