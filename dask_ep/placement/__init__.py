"""Which expert is where?"""
